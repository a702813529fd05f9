from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.render import Example, Renderer, TooLong
from veneer.data.settings import DataSettings
from veneer.data.sources import Row
from veneer.errors import DataError, ModelError

CHAT, PLAIN = DataSettings(train="x"), DataSettings(train="x", format="plain")
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda t: t.strip() and "<|" not in t
)
Rows = Callable[..., Row]


def bytes_of_tokens(tokenizer: Any, ids: list[int]) -> list[bytes]:
    """Each token's own bytes, by GPT-2's table of visible characters; special tokens as they are written."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in kept]
    table = {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(moved)}
    return [
        token.encode() if token.startswith("<|") else bytes(table[c] for c in token)
        for token in tokenizer.convert_ids_to_tokens(ids)
    ]


def mask_by_walking(tokenizer: Any, ids: list[int], pieces: list[tuple[str, bool]]) -> list[bool]:
    """The oracle: lay the hand-written pieces over the tokens byte by byte; no offsets, no template."""
    owner = [trained for text, trained in pieces for _ in text.encode()]
    walked, at = [], 0
    for token in bytes_of_tokens(tokenizer, ids):
        walked.append(owner[at])
        at += len(token)
    assert at == len(owner), "the tokens do not spell the text"
    return walked


def chatml(turns: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    pieces = []
    for role, text in turns:
        pieces.append((f"<|im_start|>{role}\n", False))
        pieces.append((f"{text}<|im_end|>", role == "assistant"))
        pieces.append(("\n", False))
    return pieces[:-1]


@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_masks_of_chats_in_any_script(tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    said = [each for user, assistant in turns for each in (("user", user), ("assistant", assistant))]
    row = Row({"messages": [{"role": role, "content": text} for role, text in said]}, "x", 1)
    renderer = Renderer(tokenizer, CHAT, 10_000)
    example, before = renderer.example(row), renderer.prompt(row)
    assert isinstance(example, Example)
    assert example.supervised.tolist() == mask_by_walking(tokenizer, example.tokens.tolist(), chatml(said))
    assert example.tokens.tolist()[: len(before)] == before


@given(prompt=WORDS, completion=WORDS, separator=st.sampled_from(["\n", "\n\n", " ", "", " => "]))
def test_plain_pairs_begin_with_the_tokens_of_their_prompt(
    tokenizer: Any, prompt: str, completion: str, separator: str
) -> None:
    renderer = Renderer(tokenizer, DataSettings(train="x", format="plain", separator=separator), 10_000)
    row = Row({"prompt": prompt, "completion": completion}, "x", 1)
    example, before = renderer.example(row), renderer.prompt(row)
    assert isinstance(example, Example)
    ids = example.tokens.tolist()
    assert ids[: len(before)] == before == tokenizer(prompt + separator)["input_ids"]
    assert ids[len(before) :] == [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
    assert example.supervised.tolist() == [False] * len(before) + [True] * (len(ids) - len(before))


@pytest.mark.parametrize(
    ("columns", "turns"),
    [
        (
            {"question": "왜 하늘은 파래?", "answer": "빛 때문이에요 😀"},
            [("user", "왜 하늘은 파래?"), ("assistant", "빛 때문이에요 😀")],
        ),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, [("user", "Add.\n\n1 2"), ("assistant", "3")]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [("user", "a"), ("assistant", "b")],
        ),
    ],
)
def test_layouts_end_to_end(tokenizer: Any, row: Rows, columns: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    renderer = Renderer(tokenizer, CHAT, 1000)
    example = renderer.example(row(**columns))
    assert isinstance(example, Example)
    ids = example.tokens.tolist()
    assert example.supervised.tolist() == mask_by_walking(tokenizer, ids, chatml(turns))
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert example.supervised[-1]
    assert renderer.prompt(row(**columns)) == ids[: len(ids) - int(example.supervised.sum())]
    assert renderer.completion(row(**columns)) == turns[-1][1]
    assert (example.source, example.line, len(example)) == ("rows.jsonl", 7, len(ids))


def test_running_text_is_trained_whole_and_ended(tokenizer: Any, row: Rows) -> None:
    example = Renderer(tokenizer, CHAT, 1000).example(row(text="the quick fox"))
    assert isinstance(example, Example)
    assert example.tokens.tolist() == [*tokenizer("the quick fox")["input_ids"], tokenizer.eos_token_id]
    assert example.supervised.tolist() == [False] + [True] * (len(example) - 1)


def test_a_begin_of_text_token_goes_before_plain_text(spaced: Any, row: Rows) -> None:
    renderer = Renderer(spaced, DataSettings(train="x", format="plain", separator=" "), 1000)
    example = renderer.example(row(prompt="hi", completion="yo"))
    assert isinstance(example, Example)
    assert spaced.convert_ids_to_tokens(example.tokens.tolist()) == ["<s>", "▁hi", "▁yo", "</s>"]
    assert example.supervised.tolist() == [False, False, True, True]


def test_a_sentencepiece_chat(spaced: Any, row: Rows) -> None:
    example = Renderer(spaced, CHAT, 1000).example(row(prompt="hi", completion="yo"))
    assert isinstance(example, Example)
    tokens = spaced.convert_ids_to_tokens(example.tokens.tolist())
    trained = [t for t, on in zip(tokens, example.supervised, strict=True) if on]
    assert trained[0] == "▁yo"
    assert trained[-1] == "</s>"
    assert tokens[tokens.index("▁yo") - 1] == "]"


def test_long_prompts_lose_their_beginning_and_are_counted(tokenizer: Any) -> None:
    rows = [Row({"prompt": "word " * n, "completion": "SELECT name"}, "r.jsonl", n) for n in (1, 50)]
    whole = Renderer(tokenizer, PLAIN, 10_000).example(rows[1])
    assert isinstance(whole, Example)
    rendered = Renderer(tokenizer, PLAIN, 60).render_all(rows)
    cut = rendered.examples[1]
    assert len(cut) == 60
    assert cut.tokens.tolist() == whole.tokens[-60:].tolist()
    assert cut.tokens[cut.supervised].tolist() == whole.tokens[whole.supervised].tolist()
    assert (rendered.report.truncated, rendered.report.dropped, rendered.report.rows) == (1, 0, 2)

    dropping = DataSettings(train="x", format="plain", too_long="drop")
    rendered = Renderer(tokenizer, dropping, 60).render_all(rows)
    assert (rendered.report.truncated, rendered.report.dropped, rendered.report.dropped_lines) == (0, 1, (50,))
    dropped = Renderer(tokenizer, dropping, 60).example(rows[1])
    assert dropped == TooLong(len(whole), "r.jsonl", 50)


def test_a_completion_too_long_is_dropped_not_cut(tokenizer: Any) -> None:
    rows = [Row({"prompt": "p", "completion": "word " * n}, "r.jsonl", n) for n in (1, 50)]
    rendered = Renderer(tokenizer, CHAT, 60).render_all(rows)
    assert [e.line for e in rendered.examples] == [1]
    assert (rendered.report.dropped, rendered.report.dropped_lines) == (1, (50,))
    with pytest.raises(DataError, match=r"none of the 1 rows fits into max_length = 60 tokens \(the shortest has \d+"):
        Renderer(tokenizer, CHAT, 60).render_all(rows[1:])


def test_long_text_is_split_without_loss(tokenizer: Any) -> None:
    row = Row({"text": "the quick brown fox jumps over the lazy dog. " * 20}, "r.jsonl", 1)
    rendered = Renderer(tokenizer, CHAT, 50).render_all([row])
    ids = [*tokenizer(row.columns["text"])["input_ids"], tokenizer.eos_token_id]
    trained = np.concatenate([e.tokens[e.supervised] for e in rendered.examples])
    assert trained.tolist() == ids[1:]
    assert (rendered.report.split, rendered.report.rows) == (1, 1)
    dropped = Renderer(tokenizer, DataSettings(train="x", too_long="drop"), 50).example(row)
    assert dropped == TooLong(len(ids), "r.jsonl", 1)
    assert rendered.report.examples == len(rendered.examples) > 1


def test_the_report_counts_what_is_there(tokenizer: Any) -> None:
    rows = [Row({"prompt": "p" * n, "completion": "c", "id": n}, "r.jsonl", n) for n in range(1, 101)]
    rendered = Renderer(tokenizer, PLAIN, 1000).render_all(rows)
    lengths, report = sorted(len(e) for e in rendered.examples), rendered.report
    assert report.tokens == sum(lengths)
    assert report.supervised == 200
    assert report.length_max == lengths[-1]
    assert report.length_p50 == lengths[50]
    assert (report.layouts, report.unused) == ({"prompt -> completion": 100}, ("id",))
    assert report.examples == 100


def test_progress_is_told_of_every_row(tokenizer: Any) -> None:
    told: list[int] = []
    rows = [Row({"text": "x y"}, "r.jsonl", n) for n in range(1100)]
    Renderer(tokenizer, CHAT, 100).render_all(rows, progress=told.append)
    assert told == [512, 512, 76]


def test_unusable_rows_are_refused_all_at_once_with_line_and_reason(tokenizer: Any) -> None:
    good = {"prompt": "p", "completion": "c"}
    bad = [{"prompt": "p", "completion": " "}, {"prompt": None, "completion": "c"}, {"a": 1}]
    rows = [Row(columns, "r.jsonl", n) for n, columns in enumerate([good, *bad, good, bad[0]], start=1)]
    with pytest.raises(DataError) as caught:
        Renderer(tokenizer, CHAT, 100).render_all(rows)
    for told in (
        "r.jsonl: 4 of 6 rows cannot be trained on",
        "lines 2, 6: the completion is empty",
        "line 3: column 'prompt' is null",
        "line 4: rows with the columns 'a' are of no known layout",
    ):
        assert told in str(caught.value)
    with pytest.raises(DataError, match=r"^r\.jsonl:2: the completion is empty"):
        Renderer(tokenizer, CHAT, 100).example(rows[1])
    with pytest.raises(DataError, match=r"^r\.jsonl:3: column 'prompt' is null"):
        Renderer(tokenizer, CHAT, 100).prompt(rows[2])
    with pytest.raises(DataError, match="there are no rows to train on"):
        Renderer(tokenizer, CHAT, 100).render_all([])


def test_templates_that_never_end_a_turn_are_refused(with_template: Callable[..., Any], row: Rows) -> None:
    endless = "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    with pytest.raises(
        DataError, match=r"ends the assistant's turn with .*without an end-of-turn token.*format: plain"
    ):
        Renderer(with_template(endless), CHAT, 100).example(row(prompt="p", completion="c"))
    without_eos = with_template(None, eos_token=None)
    with pytest.raises(ModelError, match=r"no end-of-text token \(eos\)"):
        Renderer(without_eos, PLAIN, 100).example(row(prompt="p", completion="c"))


def test_a_tokenizer_without_chat_template_is_refused_for_chats_only(
    with_template: Callable[..., Any], row: Rows
) -> None:
    renderer = Renderer(with_template(None), CHAT, 100)
    with pytest.raises(ModelError, match=r"no chat template; set data\.format: plain"):
        renderer.render_all([row(prompt="p", completion="c")])
    assert isinstance(renderer.example(row(text="plain text")), Example)


@pytest.mark.model
def test_smollm2_with_its_default_system_message(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    system = ("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
    for columns, turns in (
        ({"question": "왜요?", "answer": "그냥요 😀"}, [system, ("user", "왜요?"), ("assistant", "그냥요 😀")]),
        ({"system": "S", "question": "q", "answer": "a"}, [("system", "S"), ("user", "q"), ("assistant", "a")]),
    ):
        renderer = Renderer(tokenizer, CHAT, 1000)
        example = renderer.example(Row(columns, "x", 1))
        assert isinstance(example, Example)
        ids = example.tokens.tolist()
        assert example.supervised.tolist() == mask_by_walking(tokenizer, ids, chatml(turns))
        whole = tokenizer.apply_chat_template([{"role": r, "content": t} for r, t in turns], tokenize=False)
        assert ids == tokenizer(whole.rstrip("\n"))["input_ids"]
