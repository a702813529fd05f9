"""What the README shows runs, in its order; what it claims of methods is what the registry has."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import ROOT, Block, blocks, run, run_shell
from veneer.disk.adapter_dir import read_adapter
from veneer.methods import METHODS
from veneer.methods.init import INITS

README = ROOT / "README.md"


@pytest.mark.usefixtures("rows")
def test_every_block_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(README):
        run(block, README, workplace)
    assert {"sh", "yaml", "python"} == {block.language for block in blocks(README)}
    assert read_adapter(workplace / "runs/sql/adapter").facts["recipe"]["optimizer"]["lr_ratio"] == 4
    trained = read_adapter(workplace / "adapters/sql").facts["recipe"]
    assert trained["storage"]["name"] == "nf4" and trained["optimizer"]["lr"] == 1e-3
    for model in ("sql", "sql-from-python"):
        assert (workplace / "models" / model / "model.safetensors").is_file()
    assert "exact_match" in capsys.readouterr().out, "veneer eval showed no table"


def test_a_wrong_command_would_be_seen() -> None:
    for line in ("make demos", "veneer trian recipe.yaml", "pip install veneer"):
        with pytest.raises(AssertionError):
            run_shell(Block("sh", line + "\n", 1))


def test_it_is_short_and_says_early_how_to_begin() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 120
    assert next(n for n, line in enumerate(lines, start=1) if line.startswith("make ")) <= 15
    recipe, python = (next(b.text.splitlines() for b in blocks(README) if b.language == x) for x in ("yaml", "python"))
    assert len(recipe) <= 12 and len(python) <= 12


def test_the_table_is_the_registry() -> None:
    text = README.read_text(encoding="utf-8")
    table = text[text.index("| method |") : text.index("Besides:")]
    assert re.findall(r"^\| \[`(\w+)`\]\(docs/methods/\1\.md\) \|", table, re.M) == list(METHODS)
    assert set(re.findall(r"^\| `lora`, \[`init: (\w+)`\]\(docs/methods/\1\.md\) \|", table, re.M)) < set(INITS)


SPECIAL: dict[str, dict[str, object]] = {
    "bottleneck": {"targets": ["mlp"]},
    "bitfit": {"targets": ["q_proj"]},
    "mora": {"rank": 4},
}
"""Settings for methods whose defaults do not fit a tiny model."""


@pytest.fixture(scope="module")
def biased(made_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose attention has biases, for methods that train these."""
    return made_model(tmp_path_factory.mktemp("models") / "biased", attention_bias=True)


def named_besides(what: str) -> list[str]:
    """What the README's line under the table lists."""
    line = re.search(rf"{what}: ([^;\n]*?)[;.]", README.read_text(encoding="utf-8").partition("Besides:")[2])
    assert line is not None, f"the README names no {what}"
    return re.findall(r"`(\w+)`", line[1])


@pytest.mark.usefixtures("rows", "workplace")
@pytest.mark.parametrize(
    ("section", "key", "name"),
    [
        (section, key, name)
        for what, section, key in (
            ("storages", "storage", "name"),
            ("optimizers", "optimizer", "name"),
            ("schedules", "train", "schedule"),
        )
        for name in named_besides(what)
    ],
)
def test_what_the_readme_names_besides_trains_from_a_recipe(
    section: str, key: str, name: str, made_model: Callable[..., Path], tmp_path: Path
) -> None:
    import veneer

    tree: dict[str, Any] = {
        "model": str(made_model(tmp_path / "wide", hidden_size=64)),
        "data": {"train": "train.jsonl", "prompt": "{question}", "completion": "{sql}"},
        "train": {"steps": 2, "tokens_per_step": 256, "dtype": "float32"},
        "run": "run",
    }
    tree.setdefault(section, {})[key] = name
    outcome = veneer.train(tree)
    facts = read_adapter(Path(outcome.adapter)).facts["recipe"]
    assert outcome.steps == 2 and facts[section][key] == name


@pytest.mark.usefixtures("rows", "workplace")
@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_of_the_table_trains_from_a_recipe(method: str, biased: Path) -> None:
    import veneer

    tree = {
        "model": str(biased),
        "method": {"name": method, **SPECIAL.get(method, {})},
        "data": {"train": "train.jsonl", "prompt": "{question}", "completion": "{sql}"},
        "optimizer": {"lr": 0.01},
        "train": {"steps": 3, "tokens_per_step": 256, "dtype": "float32"},
        "run": "run",
    }
    outcome = veneer.train(tree)
    veneer.load_adapter(
        veneer.load_model(biased, dtype="float32").network, outcome.adapter
    )  # raises if it changes nothing
    assert outcome.steps == 3
    assert json.loads((Path(outcome.adapter) / "veneer.json").read_text())["method"] == method
