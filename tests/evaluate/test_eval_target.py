"""A run's folder says what to measure and how; options outrank it; what is missing is named."""

from pathlib import Path
from typing import Any

import pytest

from veneer.data.sources import Row
from veneer.errors import ConfigError
from veneer.evaluate.eval_target import default_metrics, prediction_rows, subject_of, table
from veneer.evaluate.runner import Evaluation

NOTHING: dict[str, Any] = {"prompt": None, "completion": None}


def make_run(folder: Path, adapter: bool = True, held_out: str | None = "val.jsonl") -> Path:
    (folder / "adapter").mkdir(parents=True) if adapter else folder.mkdir()
    eval_line = f"  eval: {held_out}\n" if held_out else ""
    (folder / "recipe.yaml").write_text(
        f"model: some/model\nrun: {folder}\ndata:\n  train: train.jsonl\n{eval_line}  prompt: '{{q}}?'\n"
        "  completion: a\n  system: Be brief.\ntrain:\n  max_length: 77\n  dtype: float32\n"
    )
    return folder


def test_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    subject = subject_of(str(run), adapter=None, source=None, templates=NOTHING)
    assert (subject.model, subject.adapter, subject.source) == ("some/model", run / "adapter", "val.jsonl")
    assert (subject.data.prompt, subject.data.system, subject.max_length, subject.dtype) == (
        "{q}?",
        "Be brief.",
        77,
        "float32",
    )
    assert subject.device == "auto"
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text() + "device: cpu\n")
    assert subject_of(str(run), adapter=None, source=None, templates=NOTHING).device == "cpu"


def test_options_outrank_the_recipe(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    other = tmp_path / "other"
    subject = subject_of(
        str(run),
        adapter=other.mkdir() or other,
        source="x.csv",
        templates={"completion": "{b}", "system": None},
        dtype="bfloat16",
        device="cuda:1",
    )
    assert subject.device == "cuda:1"
    assert (subject.adapter, subject.source, subject.data.completion) == (other, "x.csv", "{b}")
    assert subject.data.prompt == "{q}?" and subject.data.system == "Be brief." and subject.dtype == "bfloat16"


def test_a_model(tmp_path: Path) -> None:
    templates = {"prompt": "{q}", "completion": "{a}", "format": "plain"}
    subject = subject_of("some/model", adapter=tmp_path, source="x.jsonl", templates=templates)
    assert (subject.model, subject.adapter, subject.data.format) == ("some/model", tmp_path, "plain")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(data=FILE\); some/model is not a run"):
        subject_of("some/model", adapter=None, source=None, templates=NOTHING)
    with pytest.raises(ConfigError, match=r"has no adapter yet .*finish it with veneer train"):
        subject_of(str(make_run(tmp_path / "a", adapter=False)), adapter=None, source=None, templates=NOTHING)
    with pytest.raises(ConfigError, match=r"names no data\.eval"):
        subject_of(str(make_run(tmp_path / "b", held_out=None)), adapter=None, source=None, templates=NOTHING)
    with pytest.raises(ConfigError, match="prompt and completion go together"):
        subject_of("m", adapter=None, source="x.jsonl", templates={"prompt": "{q}"})


def test_default_metrics(tmp_path: Path) -> None:
    pair = subject_of("m", adapter=None, source="x.jsonl", templates={"prompt": "q", "completion": "a"})
    bare = subject_of("m", adapter=None, source="x.jsonl", templates=NOTHING)
    rows = [Row({"q": "x", "a": "y"}, "x", 1)]
    assert default_metrics(pair.data, rows, None) == ("loss", "perplexity", "exact_match")
    assert default_metrics(pair.data, rows, "a") == ("exact_match",)
    assert default_metrics(bare.data, [Row({"text": "x"}, "x", 1)], None) == ("loss", "perplexity")


def test_table_and_predictions() -> None:
    before = Evaluation({"sql": 0.25}, 4, [{"prediction": "a", "scores": {"sql": 0.0}, "line": 1}], 0, 0, 1.0)
    after = Evaluation({"sql": 0.75}, 4, [{"prediction": "b", "scores": {"sql": 1.0}, "line": 1}], 0, 0, 1.0)
    assert table(None, after) == [("metric", "value"), ("sql", "0.75")]
    assert table(before, after) == [("metric", "before", "after", "change"), ("sql", "0.25", "0.75", "+0.5")]
    assert prediction_rows(None, after) == after.predictions
    assert prediction_rows(before, after) == [
        {"prediction": "b", "scores": {"sql": 1.0}, "line": 1, "prediction_before": "a", "scores_before": {"sql": 0.0}}
    ]
