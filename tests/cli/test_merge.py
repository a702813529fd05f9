"""`veneer merge` writes a folder that transformers loads, proves it on real rows, and refuses what it cannot prove."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer.merge.verified_merge as merged_module
from tests.methods.layers import moved
from tests.methods.parity import fresh, logits
from veneer.adapters.attach import attach, load_adapter
from veneer.cli.main import invoke
from veneer.disk.tensors import open_tensors
from veneer.methods.base import config_from

Make = Callable[..., Path]
FIGURES = {"folder", "bytes", "rows", "max_drift", "relative_drift", "greedy_agreement", "near_ties"}


@pytest.fixture
def trained(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """An adapter as training leaves it, small beside the weights; it knows its rows and templates."""

    def make(**data: Any) -> Path:
        rows = tmp_path / "rows.jsonl"
        rows.write_text("".join(json.dumps({"q": f"Which city has {n}?", "a": "Seoul"}) + "\n" for n in range(7)))
        settings = {"train": str(rows), "prompt": "{q}", "completion": "{a}", **data}
        recipe = {"data": settings, "train": {"max_length": 64}, "model": "elsewhere", "run": "gone"}
        adapter = attach(fresh(tiny_model), config_from("lora", {"rank": 2, "alpha": 2.0}))
        for n, delta in enumerate(adapter.deltas.values()):
            moved(delta, 0.1, seed=n)
        adapter.save(tmp_path / "adapter", {"recipe": recipe})
        return tmp_path / "adapter"

    return make


def run(model: Path, adapter: Path, into: Path, *more: str) -> int:
    return invoke(["merge", str(model), "--adapter", str(adapter), "--into", str(into), *more])


def test_the_merged_model_is_the_unmerged_one(
    tiny_model: Path, trained: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, into = trained(), tmp_path / "out" / "merged"
    assert run(tiny_model, adapter, into, "--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert set(result) == FIGURES and captured.out.count("\n") == 1
    assert result["folder"] == str(into) and result["bytes"] > 100_000 and result["rows"] == 7
    assert result["greedy_agreement"] == 1.0 and 0 <= result["max_drift"] < 1e-3 and result["near_ties"] == 0
    assert captured.err.splitlines()[-1] == "comparing the merged model with the unmerged one"
    unmerged = fresh(tiny_model)
    load_adapter(unmerged, adapter)
    want = logits(unmerged)
    assert float((logits(fresh(into)) - want).norm() / want.norm()) <= 1e-5


def test_for_people(tiny_model: Path, trained: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    into = tmp_path / ("[bold] a long name " + "x" * 80)
    assert run(tiny_model, trained(), into, "--rows", "3", "--dtype", "bfloat16") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"merged: {into} (") and out[1].startswith("verified on 3 rows: same greedy text on ")
    assert len(out) == 2 and "largest logit difference" in out[1]
    assert {e.dtype for e in open_tensors(into).values()} == {torch.bfloat16}


def test_rows_of_another_adapter_with_their_own_columns(
    tiny_model: Path, random_adapter: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, rows = random_adapter("peft"), tmp_path / "others.jsonl"
    rows.write_text('{"ask": "Which city?"}\n')
    assert run(tiny_model, adapter, tmp_path / "built-in", "--json") == 0
    captured = capsys.readouterr()
    assert "verifying on 8 built-in texts" in captured.err and json.loads(captured.out)["rows"] == 8
    assert run(tiny_model, adapter, tmp_path / "a", "--data", str(rows)) == 2
    assert "rows with the columns 'ask' are of no known layout" in capsys.readouterr().err
    given = ["--data", str(rows), "--prompt", "{ask}", "--format", "plain", "--json"]
    assert run(tiny_model, adapter, tmp_path / "a", *given) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1


def test_running_text_and_rows_longer_than_the_model(
    tiny_model: Path, trained: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "the quick brown fox " * 200, "q": "why " * 900, "a": "x"}) + "\n")
    for n, settings in enumerate(({"text": "{text}", "prompt": None, "completion": None}, {})):
        assert run(tiny_model, trained(train=str(long), **settings), tmp_path / f"merged-{n}", "--json") == 0
        assert json.loads(capsys.readouterr().out)["greedy_agreement"] == 1.0


def test_the_evaluation_rows_come_first(
    tiny_model: Path, trained: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held.jsonl").write_text('{"q": "x", "a": "y"}\n{"q": "z", "a": "y"}\n')
    adapter = trained(eval=str(tmp_path / "held.jsonl"), eval_rows=1, rows=5)
    assert run(tiny_model, adapter, tmp_path / "merged", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 2


def test_another_base(tiny_model: Path, tiny_untied: Path, trained: Make, tmp_path: Path) -> None:
    adapter = trained()
    assert run(tiny_untied, adapter, tmp_path / "merged") == 2
    assert not (tmp_path / "merged").exists()
    assert run(tiny_untied, adapter, tmp_path / "merged", "--allow-other-base") == 0


def test_one_that_does_not_verify_is_refused(
    tiny_model: Path,
    trained: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tampering(*given: Any, **named: Any) -> int:
        size = merge(*given, **named)
        tensors = load_file(given[2] / "model.safetensors")
        tensors["model.norm.weight"][5] += 1
        save_file(tensors, given[2] / "model.safetensors", metadata={"format": "pt"})
        return size

    merge = merged_module.merge
    monkeypatch.setattr(merged_module, "merge", tampering)
    assert run(tiny_model, trained(), tmp_path / "merged", "--json") == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "does not say what the unmerged one says" in captured.err and "do not use it" in captured.err


def test_a_folder_that_is_taken(
    tiny_model: Path, trained: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained()
    before = {f: f.read_bytes() for f in (*tiny_model.iterdir(), *adapter.iterdir())}
    for into, words in (
        (tiny_model, "is the base model itself; merge into a new folder"),
        (adapter, "exists already; merge into a new folder, or remove that one"),
        (tmp_path / "rows.jsonl", "exists already"),
    ):
        assert run(tiny_model, adapter, into) == 2
        assert words in capsys.readouterr().err
    assert {f: f.read_bytes() for f in (*tiny_model.iterdir(), *adapter.iterdir())} == before


def test_a_method_that_is_no_weight(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = attach(fresh(tiny_model), config_from("bottleneck", {}), ("mlp",))
    for parameter in adapter.parameters():
        parameter.data += 0.1
    adapter.save(tmp_path / "blocks")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    assert run(tiny_model, tmp_path / "blocks", tmp_path / "m", "--data", str(tmp_path / "rows.jsonl")) == 2
    err = capsys.readouterr().err
    assert "model.layers.0.mlp: Bottleneck is not a change of one weight" in err
    assert "Nothing was written. Keep the adapter beside its model: `veneer generate MODEL --adapter DIR`" in err
    assert not (tmp_path / "m").exists()


BAD: list[tuple[list[str], dict[str, Any], str]] = [
    (
        ["--dtype", "bf16"],
        {},
        "there is no such dtype. Did you mean 'bfloat16'? Known: keep, float32, bfloat16, float16",
    ),
    (["--rows", "0"], {}, "--rows"),
    (["--data", "absent.jsonl"], {}, "there is no file absent.jsonl"),
    (["--prompt", "{question}"], {}, "rows.jsonl:1: data.prompt names the column 'question', which is not there"),
    (["--format", "prose"], {}, "data.format is 'prose'"),
    ([], {"train": "gone.jsonl"}, "was trained on gone.jsonl: there is no file gone.jsonl"),
    ([], {"prompts": "{q}"}, "veneer.json, or --prompt and --format: there is no key data.prompts. Did you mean"),
]


@pytest.mark.parametrize(("more", "data", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_input(
    tiny_model: Path,
    trained: Make,
    tmp_path: Path,
    more: list[str],
    data: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tiny_model, trained(**data), tmp_path / "merged", *more) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("recipe", [[], {"data": "rows.jsonl"}, {"data": {"train": 7}}, {"train": []}], ids=str)
def test_a_veneer_json_that_holds_something_else(
    tiny_model: Path, trained: Make, tmp_path: Path, recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained()
    facts = json.loads((adapter / "veneer.json").read_text())
    (adapter / "veneer.json").write_text(json.dumps({**facts, "recipe": recipe}))
    status, err = run(tiny_model, adapter, tmp_path / "merged"), capsys.readouterr().err
    if recipe == {"data": {"train": 7}}:
        assert status == 2 and "data.train is 7, the name of a file or data set is needed; --data FILE" in err
    else:
        assert status == 0 and "verifying on 8 built-in texts" in err
