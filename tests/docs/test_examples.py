"""The examples run as they are, on a tiny model."""

import ast
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from veneer.cli.main import invoke
from veneer.disk.adapter_dir import read_adapter

EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: str) -> None:
    before = sys.argv
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    finally:
        sys.argv = before


def test_scripts_are_short_and_all_are_here() -> None:
    scripts = {p.name: len(p.read_text(encoding="utf-8").splitlines()) for p in EXAMPLES.glob("*.py")}
    assert set(scripts) == {"lora_in_python.py", "swap_adapters.py"} and max(scripts.values()) < 60
    assert {p.name for p in EXAMPLES.glob("*.yaml")} == {"own_jsonl.yaml"}


def test_notebooks_are_short_and_convert_to_jupyters_format(tmp_path: Path) -> None:
    import notebooks

    assert [p.stem for p in notebooks.SCRIPTS] == ["lora_and_qlora", "two_adapters"]
    for script, made in zip(notebooks.SCRIPTS, notebooks.write(tmp_path), strict=True):
        text = script.read_text(encoding="utf-8")
        book = json.loads(made.read_text(encoding="utf-8"))
        assert len(text.splitlines()) < 60 and (book["nbformat"], book["nbformat_minor"]) == (4, 5)
        assert [c["cell_type"] for c in book["cells"]][:2] == ["markdown", "code"]
        code = "\n".join(c["source"] for c in book["cells"] if c["cell_type"] == "code")
        assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(text)), "the cells are the script"
        assert text.count("# %%") == len(book["cells"])


def test_the_notebook_of_lora_and_qlora(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(EXAMPLES, workplace / "examples")
    run("notebooks/lora_and_qlora.py")
    said = capsys.readouterr().out
    assert "before:" in said and "after:" in said and "held-out loss: LoRA" in said
    assert read_adapter(workplace / "runs/notebook-qlora/adapter").facts["recipe"]["storage"]["name"] == "nf4"
    assert (workplace / "models/notebook-tickets/model.safetensors").is_file()


def test_the_notebook_of_two_adapters(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("notebooks/two_adapters.py")
    said = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines() if ":" in line)
    assert said["base bit-identical"] == " True"
    assert len({said["base"], said["capital"], said["shout"]}) == 3, "each adapter changes what is said"


def test_a_loop_of_ones_own_and_swapping_what_it_made(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("lora_in_python.py", "smollm2-135m-instruct", "10", "runs/facts")
    run("lora_in_python.py", "smollm2-135m-instruct", "20", "runs/more")
    said = capsys.readouterr().out
    first, second = (float(line.rpartition(" ")[2]) for line in said.splitlines() if line.startswith("step 10"))
    assert first == second, "two runs of one seed"
    assert float(said.rpartition("step 20: loss ")[2].partition("\n")[0]) < first
    assert read_adapter(workplace / "runs/facts").config["base_model_name_or_path"] == "smollm2-135m-instruct"
    run("swap_adapters.py", "smollm2-135m-instruct", "Who won?", "runs/facts", "runs/more")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["base", "runs/facts", "runs/more"]
    assert lines[-1] == "base again, bit-identical: True"
    assert len({line.partition(" ")[2].strip() for line in lines[:3]}) > 1, "an adapter changes what is said"


def test_the_recipe_trains_and_is_measured_by_the_command_it_names(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(EXAMPLES, workplace / "examples")
    assert invoke(["train", "examples/own_jsonl.yaml", "--train.epochs", "1"]) == 0
    assert invoke(["eval", "runs/tickets", "--metric", "accuracy", "--max-tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out and "8 rows of examples/tickets_held_out.jsonl" in out
