"""`veneer list` shows every thing of every registry, with what its own file says of it."""

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from veneer.cli.list_ import KINDS, settings_of
from veneer.cli.main import invoke
from veneer.evaluate.metrics import METRICS
from veneer.methods import METHODS
from veneer.methods.init import INITS
from veneer.models.sources import ALIASES
from veneer.prompts import PROMPTS
from veneer.storage import STORAGES
from veneer.tasks import TASKS
from veneer.train.optim import OPTIMIZERS
from veneer.train.schedule import SCHEDULES

SOURCE = Path(__file__).parents[2] / "src" / "veneer"
NAMES = {
    "methods": set(METHODS),
    "inits": set(INITS),
    "prompts": set(PROMPTS),
    "storages": set(STORAGES),
    "tasks": set(TASKS),
    "metrics": {*METRICS, "loss", "perplexity"},
    "models": set(ALIASES),
    "schedules": set(SCHEDULES),
    "optimizers": set(OPTIMIZERS),
}


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[str], dict[str, list[dict[str, object]]]]:
    """The lines for people and the closing JSON."""
    assert invoke(["list", *arguments, "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_everything_is_listed_once_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines, found = listed(capsys)
    assert list(found) == list(KINDS) == list(NAMES)
    for kind, items in found.items():
        assert [str(i["name"]) for i in items] == list(dict.fromkeys(str(i["name"]) for i in items))
        assert {i["name"] for i in items} == NAMES[kind]
        for item in items:
            assert item["summary"], f"{kind} {item['name']} says nothing about itself"
            assert sum(line.split()[:1] == [item["name"]] and str(item["summary"]) in line for line in lines) == 1


def test_no_registry_is_left_out() -> None:
    nouns = {
        n for f in SOURCE.rglob("*.py") for n in re.findall(r'= Registry\("(\w+)"\)', f.read_text(encoding="utf-8"))
    }
    assert "method" in nouns
    assert {re.sub("y$", "ie", n) + "s" for n in nouns} <= set(KINDS)


def test_a_method_is_told_by_the_first_line_of_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = listed(capsys, "methods")
    assert list(found) == ["methods"]
    for item in found["methods"]:
        file = next(f for f in (SOURCE / "methods").glob("*.py") if f'METHODS.add("{item["name"]}")' in f.read_text())
        assert item["summary"] == (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]


def test_settings_are_those_of_the_method_with_what_stands_under_them(capsys: pytest.CaptureFixture[str]) -> None:
    lines, found = listed(capsys, "methods")
    lora = next(i for i in found["methods"] if i["name"] == "lora")
    assert lora["layers"] == ["conv", "embedding", "linear"] and lora["source"] == "arXiv:2106.09685"
    settings = {s["name"]: s for s in lora["settings"]}  # type: ignore[attr-defined]
    assert settings["rank"] == {"name": "rank", "default": 8, "help": "R, at least 1."}  # inherited, text and all
    assert settings["init"]["choices"] == ["eva", "gaussian", "pissa", "random", "uniform"]
    assert "    rank: 8  R, at least 1." in lines
    assert any(line.startswith('    init: "uniform" (eva | gaussian | pissa | random | uniform)  ') for line in lines)


def test_inits_are_told_with_their_settings_and_each_method_says_which_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines, found = listed(capsys, "inits")
    pissa = next(i for i in found["inits"] if i["name"] == "pissa")
    assert pissa["layers"] == ["linear"] and pissa["source"] == "arXiv:2404.02948"
    assert [(s["name"], s["default"]) for s in pissa["settings"]] == [("iterations", 0)]  # type: ignore[attr-defined]
    assert any(line.startswith("    iterations: 0  ") for line in lines)
    _, found = listed(capsys, "methods")
    dora = next(i for i in found["methods"] if i["name"] == "dora")
    choices = {s["name"]: s.get("choices") for s in dora["settings"]}  # type: ignore[attr-defined]
    assert choices["init"] == ["gaussian", "random", "uniform"]


def test_every_setting_of_every_method_and_storage_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = listed(capsys)
    for item in found["methods"] + found["inits"] + found["prompts"] + found["storages"]:
        for setting in item["settings"]:  # type: ignore[attr-defined]
            assert setting["help"].endswith("."), f"{item['name']}.{setting['name']} says {setting['help']!r}"


def test_a_file_of_several_things_lets_each_speak(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = listed(capsys, "schedules")
    assert {i["name"]: i["summary"] for i in found["schedules"]}["linear"] == "A straight line to 0."


def test_an_unknown_kind_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["list", "method"]) == 2
    said = capsys.readouterr().err
    assert "there is no kind 'method'. Did you mean 'methods'?" in said and "optimizers" in said


@dataclass(frozen=True)
class Parent:
    """A settings class."""

    first: int
    """Above, in the parent;
    over two lines."""


@dataclass(frozen=True)
class Child(Parent):
    """One made from it."""

    second: Literal[1, 2] | None = None
    """Below."""
    third: tuple[str, ...] = ("a",)


def test_settings_are_read_from_the_class_and_its_parents() -> None:
    assert settings_of(Child) == [
        {"name": "first", "default": None, "help": "Above, in the parent; over two lines."},
        {"name": "second", "default": None, "help": "Below.", "choices": [1, 2]},
        {"name": "third", "default": ("a",), "help": ""},
    ]
