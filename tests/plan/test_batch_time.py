"""Pieces of one block become seconds of a micro-batch: every block of its kind, at least as long as the disk needs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.kernels import native
from veneer.plan import batch_time as module
from veneer.plan.batch_time import Clock, facts, most_runs
from veneer.plan.block_timing import RUNS, Pieces
from veneer.plan.io_time import Needs
from veneer.plan.meta_model import Plain
from veneer.recipe.settings import Recipe
from veneer.train.job import order_of_steps, read_job

Make = Callable[..., Recipe]
KEPT = Pieces(outside=0.5, forward=1.0, backward=2.0, head=0.01, head_forward=0.003, change=0.1)
AGAIN = Pieces(outside=0.4, forward=0.9, backward=3.0, head=0.02, head_forward=0.003, change=0.1)


@pytest.fixture
def clock_of(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """Of two blocks and rows that are all alike; nothing is measured."""
    monkeypatch.setattr(module, "pieces", lambda plain, batch, again, ran: AGAIN if again else KEPT)
    monkeypatch.setattr(module, "BUFFERS", 0)
    file = tmp_path / "same.jsonl"
    file.write_text((json.dumps({"text": "the order of the count"}) + "\n") * 4)

    def make(**changes: Any) -> Clock:
        made = recipe(data={"train": str(file), "packing": False}, **changes)
        rows = read_job(made)
        order = order_of_steps([len(e) for e in rows.examples], made.train, packing=False)
        return Clock(made, rows, order, lambda _: None)

    return make


@pytest.mark.parametrize(
    ("recompute", "counts", "seconds"),
    [
        (False, {False: 2}, 0.5 + 2 * (1.0 + 2.0)),
        (True, {True: 2}, 0.4 + 2 * (0.9 + 3.0)),
        (1, {False: 1, True: 1}, 0.4 + (1.0 + 2.0) + (0.9 + 3.0)),
    ],
)
def test_blocks_count_by_their_kind(
    recompute: Any, counts: dict[bool, int], seconds: float, clock_of: Callable[..., Clock]
) -> None:
    clock = clock_of(**{"train.recompute": recompute})
    assert clock.counts == counts
    assert clock.body(Needs())(clock.chosen[0].work) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("needs", "seconds"),
    [
        (Needs(weights=0.5), 6.5),  # read while a block is computed
        (Needs(weights=1.5), 0.5 + 2 * (1.5 + 2.0)),
        (Needs(weights=1.5, written=1.0, read=1.0), 0.5 + 2 * (2.5 + 2.5)),
        (Needs(state=9.0), 6.5),  # once a step, not for each block
    ],
)
def test_a_block_takes_as_long_as_the_disk_needs(needs: Needs, seconds: float, clock_of: Callable[..., Clock]) -> None:
    clock = clock_of()
    assert clock.body(needs)(clock.chosen[0].work) == pytest.approx(seconds)


def test_a_pass_without_gradient_reads_weights_and_keeps_no_inputs(clock_of: Callable[..., Clock]) -> None:
    clock = clock_of()
    work = clock.chosen[0].work
    assert clock.forward(Needs(written=9.0))(work) == pytest.approx(0.5 + 2 * 1.0)
    assert clock.forward(Needs(weights=1.5))(work) == pytest.approx(0.5 + 2 * 1.5)


def test_what_does_not_depend_on_the_work_is_a_mean(clock_of: Callable[..., Clock]) -> None:
    assert clock_of(**{"train.recompute": 1}).mean("head") == pytest.approx(0.015)


def test_where_things_lie_is_no_fact_about_a_block(recipe: Make) -> None:
    again = {"train.recompute": True}
    kept, paged = (facts(Plain.of(recipe(**again, **{"memory.page_activations": p}))) for p in (False, True))
    assert kept == paged != facts(Plain.of(recipe(**again, method={"name": "ia3"})))


@pytest.mark.parametrize(("recompute", "kinds"), [(False, 1), (True, 1), (1, 2), ((0,), 2)])
def test_so_many_runs_at_most(recompute: Any, kinds: int, recipe: Make) -> None:
    assert most_runs(recipe(**{"train.recompute": recompute})) == 2 * kinds * (1 + RUNS)


def test_seconds_with_other_kernels_are_others(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {name: Plain.of(recipe(storage={"name": name})) for name in ("dense", "nf4")}
    eight = Plain.of(recipe(**{"optimizer.bits": 8}))
    found = []
    for isa in ("avx512", None):
        status = native.Status(isa is not None, None, isa, "")
        monkeypatch.setattr(native, "status", lambda status=status: status)
        found.append([facts(plain) for plain in (made["dense"], made["nf4"], eight)])
    assert [one == other for one, other in zip(*found, strict=True)] == [True, False, False]
