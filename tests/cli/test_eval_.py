"""`veneer eval` measures a model, before and after its adapter, on rows that a recipe or options describe."""

import json
import math
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.adapters.attach import load_adapter
from veneer.cli.main import invoke

ROWS = [{"q": "Which city?", "a": "Seoul"}, {"q": "How many employees were hired?", "a": "12"}, {"q": "x", "a": "y z"}]
COMMON = ["--prompt", "{q}", "--completion", "{a}", "--max-tokens", "6", "--dtype", "float32"]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return str(file)


def loss_of(folder: Path, adapter: Path | None) -> float:
    """Mean nats of answer and end-of-turn tokens, one row and one token at a time."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if adapter is not None:
        load_adapter(model, adapter)
    nats, count = 0.0, 0
    for row in ROWS:
        before = tokenizer.encode(f"<|im_start|>user\n{row['q']}<|im_end|>\n<|im_start|>assistant\n")
        ids = before + tokenizer.encode(f"{row['a']}<|im_end|>")
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats -= sum(float(log_p[i - 1, ids[i]]) for i in range(len(before), len(ids)))
        count += len(ids) - len(before)
    return nats / count


def test_before_and_after(
    tiny_model: Path,
    random_adapter: Callable[..., Path],
    rows: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, answers = random_adapter("sql"), tmp_path / "out" / "answers.jsonl"
    arguments = ["eval", str(tiny_model), "--adapter", str(folder), "--data", rows, *COMMON]
    assert invoke([*arguments, "--predictions", str(answers), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["rows"] == 3 and list(result["metrics"]) == ["loss", "perplexity", "exact_match"]
    assert result["metrics"]["loss"] == pytest.approx(loss_of(tiny_model, folder), rel=1e-4)
    assert result["before"]["loss"] == pytest.approx(loss_of(tiny_model, None), rel=1e-4)
    assert result["metrics"]["perplexity"] == pytest.approx(math.exp(result["metrics"]["loss"]))
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(w["line"], w["reference"]) for w in written] == [(1, "Seoul"), (2, "12"), (3, "y z")]
    assert any(w["prediction"] != w["prediction_before"] for w in written)

    assert invoke(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["metric", "before", "after", "change"]
    assert out[1].split()[:3] == ["loss", f"{result['before']['loss']:.4g}", f"{result['metrics']['loss']:.4g}"]
    assert out[-1] == f"3 rows of {rows}"


def test_a_run_and_no_before(
    tiny_model: Path,
    random_adapter: Callable[..., Path],
    rows: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = random_adapter("run/adapter")
    data = {"train": rows, "eval": rows, "prompt": "{q}", "completion": "{a}"}
    recipe = {"model": str(tiny_model), "run": str(tmp_path / "run"), "data": data, "train": {"dtype": "float32"}}
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(recipe))
    assert invoke(["eval", str(tmp_path / "run"), "--metric", "loss", "--no-before", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "before" not in result
    assert result["metrics"] == {"loss": pytest.approx(loss_of(tiny_model, adapter), rel=1e-4)}


def test_metrics_rows_and_a_reference_column(tiny_model: Path, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(tiny_model), "--data", rows, *COMMON, "--reference", "a", "--rows", "2", "--json"]
    assert invoke([*arguments, "--metric", "rouge_l,accuracy", "--metric", "exact_match"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["metrics"]) == ["rouge_l", "accuracy", "exact_match"] and result["rows"] == 2
    assert "before" not in result


def test_sql_against_a_file(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database, file = tmp_path / "c.db", tmp_path / "sql.jsonl"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE t (a)")
    connection.close()
    file.write_text(json.dumps({"q": "all?", "a": "SELECT a FROM t"}) + "\n")
    arguments = ["eval", str(tiny_model), "--data", str(file), *COMMON, "--metric", "sql"]
    assert invoke([*arguments, "--database", str(database), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == {"sql": 0.0}
    assert invoke([*arguments, "--database", str(tmp_path / "none.db")]) == 2
    assert "there is no SQLite database" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metric", "rouge"], "there is no metric 'rouge'. Did you mean 'rouge_l'?"),
        (["--reference", "answer"], "no reference column 'answer'"),
        (["--completion", "{answer}"], "names the column 'answer', which is not there"),
        (["--data", "absent.jsonl"], "there is no file absent.jsonl"),
        (["--adapter", "absent"], "absent"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--metric", "loss", "--predictions", "x.jsonl"], "there would be no answers to write: loss need none"),
        (["--metric", "f1", "--positive", "spam"], "no reference has the positive label 'spam'"),
        (["--metric", "numeric"], "has no number in it"),
    ],
)
def test_bad_input(
    tiny_model: Path, rows: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["eval", str(tiny_model), "--data", rows, *COMMON, *more]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_empty_data(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert invoke(["eval", str(tiny_model), "--data", str(tmp_path / "empty.jsonl"), *COMMON]) == 2
    assert "empty.jsonl is empty" in capsys.readouterr().err


def test_an_adapter_that_does_not_fit(
    tiny_model: Path,
    made_model: Callable[..., Path],
    random_adapter: Callable[..., Path],
    rows: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = random_adapter("wide", model=made_model(tmp_path / "wider", hidden_size=48))
    assert invoke(["eval", str(tiny_model), "--adapter", str(folder), "--data", rows, *COMMON]) == 2
    err = capsys.readouterr().err
    assert "does not fit" in err and "wide" in err
