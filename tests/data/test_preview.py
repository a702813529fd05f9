from typing import Any

import pytest

from veneer.data.pack import plan_batches
from veneer.data.preview import Segment, as_json, colored, describe, histogram, segments, totals
from veneer.data.render import Example, Renderer
from veneer.data.settings import DataSettings
from veneer.data.sources import Row


def test_segments_spell_the_row_and_split_where_training_begins(tokenizer: Any) -> None:
    talk = [("user", "왜?"), ("assistant", "빛 😀"), ("user", "b"), ("assistant", "c")]
    row = Row({"messages": [{"role": r, "content": t} for r, t in talk]}, "x", 1)
    example = Renderer(tokenizer, DataSettings(train="x"), 1000).example(row)
    assert isinstance(example, Example)
    assert segments(example, tokenizer) == [
        Segment("<|im_start|>user\n왜?<|im_end|>\n<|im_start|>assistant\n", False),
        Segment("빛 😀<|im_end|>", True),
        Segment("\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n", False),
        Segment("c<|im_end|>", True),
    ]


def test_segments_keep_the_spaces_of_sentencepiece(spaced: Any) -> None:
    settings = DataSettings(train="x", format="plain", separator=" ")
    example = Renderer(spaced, settings, 100).example(Row({"prompt": "hi", "completion": "yo yo"}, "x", 1))
    assert isinstance(example, Example)
    assert [s.text for s in segments(example, spaced)][1] == " yo yo</s>"


def test_colors_or_marks_and_no_control_characters() -> None:
    parts = [Segment("a\n\x1b[2Jb", False), Segment("한😀\x07", True)]
    marked = colored(parts, color=False)
    assert marked.plain == "a\n\\x1b[2Jb⟦한😀\\x07⟧"
    painted = colored(parts, color=True)
    assert painted.plain == "a\n\\x1b[2Jb한😀\\x07"
    assert [(painted.plain[s.start : s.end], s.style) for s in painted.spans] == [("한😀\\x07", "bold green")]


def test_histogram_counts_every_length_once() -> None:
    lines = histogram([1, 1, 10, 11, 100])
    assert len(lines) == 10
    assert [line.split()[-1] for line in lines] == ["3", "1", "0", "0", "0", "0", "0", "0", "0", "1"]
    assert [line.count("█") for line in lines] == [40, 13, 0, 0, 0, 0, 0, 0, 0, 13]
    assert lines[1].startswith(" 11 -  20")
    assert [line.split()[-1] for line in histogram([5])] == ["0", "0", "0", "0", "1"]
    assert sum(int(line.split()[-1]) for line in histogram(list(range(1, 98)))) == 97


def test_totals_and_their_sentences(tokenizer: Any) -> None:
    settings = DataSettings(train="x", format="plain")
    rows = [Row({"prompt": "p" * n, "completion": "c", "id": n}, "r.jsonl", n) for n in (2, 4, 40)]
    rendered = Renderer(tokenizer, settings, 20).render_all(rows)
    figures = totals(rendered, [[[0, 1]], [[2]]])
    lengths = [len(e) for e in rendered.examples]
    assert figures.packing_efficiency == pytest.approx(sum(lengths) / (2 * max(lengths[:2]) + lengths[2]))
    assert figures.supervised_share == pytest.approx(6 / sum(lengths))
    assert (figures.steps_per_epoch, figures.micro_batches_per_epoch) == (2, 2)
    told = "\n".join(describe(rendered, figures))
    for part in ("prompt -> completion, 3 rows", "columns 'id'", "3, 1 truncated; 3 examples", "2 steps"):
        assert part in told
    assert as_json(rendered, figures)["tokens"] == sum(lengths)
    plan = plan_batches(lengths, max_length=20, tokens_per_step=9, seed=0, epoch=0)
    assert totals(rendered, plan).steps_per_epoch == 2
