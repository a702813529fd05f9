"""Evaluation puts prompts, answers, references and metrics together, and names what is wrong before it generates."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.base.base import Base
from veneer.data.render import Renderer
from veneer.data.settings import DataSettings
from veneer.data.sources import Row
from veneer.errors import ConfigError, DataError
from veneer.evaluate.metrics import MetricOptions
from veneer.evaluate.runner import EvalSettings, answer, evaluate, references_of

QUESTIONS = ["Which city?", "How many employees were hired after 2019?", "the quick brown fox"]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def rows_of(answers: list[Any]) -> list[Row]:
    return [Row({"q": q, "a": a}, "rows.jsonl", n) for n, (q, a) in enumerate(zip(QUESTIONS, answers, strict=True), 1)]


def renderer(tokenizer: Any, **changes: Any) -> Renderer:
    return Renderer(
        tokenizer, DataSettings(**({"train": "rows.jsonl", "prompt": "q", "completion": "a"} | changes)), 128
    )


def spoken(model: Any, tokenizer: Any) -> list[str]:
    """What the model answers, by transformers' own generation."""
    texts = []
    for question in QUESTIONS:
        ids = torch.tensor([tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


def test_answers_are_scored_against_the_completions(model: Any, tokenizer: Any) -> None:
    said = spoken(model, tokenizer)
    rows = rows_of([said[0], "else", said[2]])
    seen: list[tuple[str, int]] = []
    from contextlib import contextmanager

    @contextmanager
    def progress(what: str, total: int) -> Any:
        yield lambda more: seen.append((what, more))

    settings = EvalSettings(metrics=("loss", "perplexity", "exact_match"), max_new_tokens=12, batch_size=2)
    found = evaluate(Base.of(model, tokenizer), rows, renderer(tokenizer), settings, progress=progress)
    assert found.metrics["exact_match"] == pytest.approx(2 / 3) and found.rows == 3
    assert list(found.metrics) == ["loss", "perplexity", "exact_match"] and found.metrics["loss"] > 0
    assert [p["prediction"] for p in found.predictions] == said
    assert [p["scores"] for p in found.predictions] == [{"exact_match": 1.0}, {"exact_match": 0.0}, {"exact_match": 1}]
    first = found.predictions[0]
    assert first["prompt"].endswith("Which city?<|im_end|>\n<|im_start|>assistant\n")
    assert (first["source"], first["line"], first["reference"]) == ("rows.jsonl", 1, said[0])
    assert sum(n for what, n in seen if what == "generating answers") == 3
    assert sum(n for what, n in seen if what == "measuring the loss") == 3


def test_the_loss_alone_generates_nothing(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.evaluate.runner.generate", None)
    found = evaluate(
        Base.of(model, tokenizer), rows_of(["x", "y", "z"]), renderer(tokenizer), EvalSettings(metrics=("loss",))
    )
    assert list(found.metrics) == ["loss"] and found.predictions == []


def test_a_reference_column_may_hold_several_answers(model: Any, tokenizer: Any) -> None:
    said = spoken(model, tokenizer)
    rows = [
        Row({"q": q, "refs": refs}, "r", n)
        for n, (q, refs) in enumerate(zip(QUESTIONS, [[s, "x"] for s in said], strict=True))
    ]
    settings = EvalSettings(metrics=("exact_match",), max_new_tokens=12, reference="refs")
    assert evaluate(Base.of(model, tokenizer), rows, renderer(tokenizer), settings).metrics == {"exact_match": 1.0}


def test_prompts_too_long_for_the_model_lose_their_beginning(model: Any, tokenizer: Any) -> None:
    rows = [Row({"q": "word " * 400, "a": "x"}, "r", 1), Row({"q": "short", "a": "x"}, "r", 2)]
    settings = EvalSettings(metrics=("exact_match",), max_new_tokens=10)
    found = evaluate(Base.of(model, tokenizer), rows, renderer(tokenizer), settings)
    assert found.truncated == 1
    assert len(tokenizer.encode(found.predictions[0]["prompt"])) <= 256 - 10
    assert found.predictions[0]["prompt"].endswith("<|im_start|>assistant\n")


def test_answer_strips_special_tokens(model: Any, tokenizer: Any) -> None:
    texts = answer(Base.of(model, tokenizer), [[1, 5, 6]], EvalSettings(max_new_tokens=5))
    assert len(texts) == 1 and "<|" not in texts[0] and texts[0] == texts[0].strip()


def test_no_rows(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no rows"):
        evaluate(Base.of(model, tokenizer), [], renderer(tokenizer), EvalSettings())


def test_a_missing_reference_column_is_found_before_anything_is_generated(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.evaluate.runner.generate", None)
    settings = EvalSettings(metrics=("exact_match",), reference="answr")
    rows = [Row({"q": "x", "answer": "y"}, "r.jsonl", n) for n in (4, 9)]
    with pytest.raises(DataError) as caught:
        evaluate(Base.of(model, tokenizer), rows, renderer(tokenizer), settings)
    assert "2 of 2 rows have no reference column 'answr'. Did you mean 'answer'?" in str(caught.value)
    assert "r.jsonl:4, r.jsonl:9" in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("numeric", "reference 'y' .* has no number"),
        ("sql", "no database: give"),
        ("f1", "no reference has the positive"),
    ],
)
def test_references_are_checked_before_anything_is_generated(
    model: Any, tokenizer: Any, metric: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.evaluate.runner.generate", None)
    settings = EvalSettings(metrics=("loss", metric), options=MetricOptions(positive="spam"))
    with pytest.raises(DataError, match=message):
        evaluate(Base.of(model, tokenizer), [Row({"q": "x", "a": "y"}, "r", 1)], renderer(tokenizer), settings)


def test_a_missing_completion_column_is_named_with_its_place(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"r\.jsonl:7.*'a'"):
        references_of([Row({"q": "x"}, "r.jsonl", 7)], renderer(tokenizer))


def test_bad_settings_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        EvalSettings(metrics=("rouge", "exactmatch"), max_new_tokens=0, batch_size=0, options=MetricOptions(seconds=0))
    for words in (
        "no metric 'rouge'. Did you mean 'rouge_l'?",
        "no metric 'exactmatch'. Did you mean 'exact_match'?",
        "Known: accuracy, bleu, exact_match, f1, loss, numeric, perplexity, rouge_l, sql.",
        "max_new_tokens must be at least 1, got 0",
        "batch_size must be at least 1, got 0",
        "seconds must be above 0, got 0",
    ):
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="no metric was named"):
        EvalSettings(metrics=())
