"""The figures of the docs are those of the recorded results, and a method page shows its own."""

import json
import re
import subprocess
from typing import Any

import pytest

from tests.docs.blocks import ROOT
from veneer.methods import METHODS
from veneer.methods.init import INITS
from veneer.prompts import PROMPTS

MEASUREMENTS: list[dict[str, Any]] = json.loads((ROOT / "docs" / "measured.json").read_text("utf-8"))["measurements"]
FIGURES = [(m["title"], f) for m in MEASUREMENTS for f in m["figures"]]


@pytest.mark.parametrize(("title", "figure"), FIGURES, ids=lambda x: x if isinstance(x, str) else x["side"])
def test_a_figure_is_that_of_the_recorded_results(title: str, figure: dict[str, Any]) -> None:
    if "from" not in figure:
        assert all(figure["values"]), "a figure is not empty"
        return
    source = figure["from"]
    lines = [json.loads(line) for line in (ROOT / source["file"]).read_text("utf-8").splitlines()]
    ours = [x for x in lines if all(x[key] == source[key] for key in ("claim", "side", "lr"))]
    seeds = {x["seed"]: x["figures"][source["figure"]] for x in ours}
    assert sorted(seeds) == [0, 1, 2]
    expected = {"mean": sum(seeds.values()) / 3, "least": min(seeds.values()), "most": max(seeds.values())}
    assert {name: figure[name] for name in expected} == {k: round(v, figure["digits"]) for k, v in expected.items()}


@pytest.mark.parametrize("measurement", MEASUREMENTS, ids=lambda m: m["title"])
def test_a_figure_without_results_stands_in_the_page_it_names(measurement: dict[str, Any]) -> None:
    page = (ROOT / "docs" / measurement["page"].partition("#")[0]).resolve()
    assert page.is_file()
    if page.name == "measurements.md":
        return  # the page is made from the file
    said = page.read_text("utf-8")
    for figure in measurement["figures"]:
        for value in figure.get("values", ()):
            for number in re.findall(r"\d+\.\d+", value):
                assert number in said, f"{measurement['title']}, {figure['side']}: {number} is not in {page.name}"


@pytest.mark.parametrize("measurement", MEASUREMENTS, ids=lambda m: m["title"])
def test_a_measurement_says_how_it_was_made(measurement: dict[str, Any]) -> None:
    script = re.match(r"python (?:-m )?([\w./]+)", measurement["command"])
    assert script is not None
    path = script[1] if script[1].endswith(".py") else script[1].replace(".", "/") + ".py"
    assert (ROOT / path).is_file(), f"no {path}"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", measurement["date"])
    assert {name for f in measurement["figures"] for name in f["of"]} <= {*METHODS, *INITS, *PROMPTS}


def test_its_commit_is_in_the_history() -> None:
    whole = subprocess.run(["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True)
    if whole.stdout.strip() != "false":
        pytest.skip("no whole git history here")
    for commit in {m["commit"] for m in MEASUREMENTS}:
        known = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=ROOT, capture_output=True)
        assert known.returncode == 0, commit


def test_a_method_page_has_its_own_figures_or_says_that_there_are_none() -> None:
    pages = {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages == {*METHODS, *PROMPTS, "eva", "pissa"}
    for name in pages:
        shown = (ROOT / "docs" / "methods" / f"{name}.md").read_text("utf-8").partition("## Measured\n")[2]
        titles = [m["title"] for m in MEASUREMENTS if any(name in f["of"] for f in m["figures"])]
        assert re.findall(r"^### (.+)$", shown, re.M) == titles
        assert bool(titles) != ("No figure of this method is recorded yet." in shown)
