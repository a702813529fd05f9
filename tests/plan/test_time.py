"""Seconds are put together from their pieces, for every micro-batch as its rows fill it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.plan.checked import checked
from veneer.data.example import Example
from veneer.data.pack import collate
from veneer.plan import time as module
from veneer.plan.disk import Disk, Needs
from veneer.plan.memory import estimate
from veneer.plan.meta_model import base_bytes
from veneer.plan.time import Clock, Load, Times, line_through, most_runs, representatives, times
from veneer.plan.timing import RUNS, Pieces
from veneer.recipe.settings import Recipe
from veneer.train.job import Job
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]
OTHER = Pieces(outside=0.4, forward=0.9, backward=3.0, head=0.02, head_forward=0.003, change=0.1)
PLAIN = Pieces(outside=0.5, forward=1.0, backward=2.0, head=0.01, head_forward=0.003, change=0.1)
AGAIN = Pieces(outside=0.5, forward=0.9, backward=3.0, head=0.01, head_forward=0.003, change=0.1)
STEPPING, WRITTEN, READ, QUANTIZED, RESTARTED = 0.25, 1e6, 3e6, 1e-3, 1e-4


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every measurement has a fixed result; the batches that were timed are collected."""
    batches: list[Any] = []

    def pieces(plain: Any, batch: Any, again: bool, *_: Any) -> Pieces:
        batches.append(batch)
        return AGAIN if again else PLAIN

    monkeypatch.setattr(module, "pieces", pieces)
    monkeypatch.setattr(module, "optimizer_seconds", lambda *_, **__: STEPPING)
    monkeypatch.setattr(module, "write_rate", lambda _: WRITTEN)
    monkeypatch.setattr(module, "read_rate", lambda *_: READ)
    monkeypatch.setattr("veneer.plan.disk.scratch_rates", lambda *_: (WRITTEN, READ))
    monkeypatch.setattr(module, "quantizing_seconds", lambda *_: QUANTIZED)
    monkeypatch.setattr(module, "restart_seconds", lambda *_: RESTARTED)
    return batches


def foreseen(recipe: Recipe, room: int | None = None) -> tuple[Times, Job]:
    made = checked(recipe)
    return times(made, estimate(made, 100 << 20), room=room), made.job


def same_rows(folder: Path, count: int = 8) -> dict[str, Any]:
    """As many rows of one length, each a micro-batch of its own, all of it trained."""
    file = folder / "same.jsonl"
    file.write_text("".join(json.dumps({"text": "the order of the count"}) + "\n" for _ in range(count)))
    return {"data": {"train": str(file), "text": "{text}", "packing": False}}


def supervised(job: Job) -> int:
    return len(job.examples[0]) - 1


def test_a_step_of_like_micro_batches(recipe: Make, measured: list[Any], tmp_path: Path) -> None:
    found, job = foreseen(recipe(**same_rows(tmp_path), **{"train.tokens_per_step": 10_000}))
    body = 0.5 + 2 * (1.0 + 2.0) + 0.01 * supervised(job)
    assert len(measured) == 1 and [len(step) for step in job.steps] == [8, 8]
    assert found.steps == pytest.approx([8 * body + 2 * 0.1 + STEPPING] * 2)
    assert found.seconds_a_step == pytest.approx(found.steps[0])


def test_recomputed_blocks_are_timed_by_themselves(recipe: Make, measured: list[Any], tmp_path: Path) -> None:
    made = recipe(**same_rows(tmp_path), **{"train.recompute": 1, "train.steps": 1, "train.tokens_per_step": 1})
    found, job = foreseen(made)
    assert len(measured) == 2
    assert found.steps[0] == pytest.approx(
        0.5 + (1.0 + 2.0) + (0.9 + 3.0) + 0.01 * supervised(job) + 2 * 0.1 + STEPPING
    )


def test_gradients_used_at_once_take_two_passes_where_they_are_clipped(
    recipe: Make, measured: list[Any], tmp_path: Path
) -> None:
    one = {**same_rows(tmp_path), "train.steps": 1, "train.tokens_per_step": 1, "optimizer.in_backward": True}
    (clipped, _), (free, _) = (foreseen(recipe(**one, **{"train.clip": c})) for c in (1.0, 0.0))
    beside = 2 * 0.1 + STEPPING
    assert clipped.steps[0] - beside == pytest.approx(2 * (free.steps[0] - beside))


def test_rows_count_with_their_own_lengths(recipe: Make, measured: list[Any], monkeypatch: Any) -> None:
    """Where a block takes as long as its work, so does every step, those in between and beyond what was timed too."""
    alone = {"data": {**recipe().data.model_dump(), "packing": False}, "train.tokens_per_step": 1, "train.steps": 8}
    made = recipe(**alone)
    width = json.loads((Path(made.model) / "config.json").read_text())["hidden_size"]
    lengths: list[int] = []

    def pieces(plain: Any, batch: Any, *_: Any) -> Pieces:
        lengths.append(n := batch.input_ids.shape[1])
        work = 12 * width * n + 3 * n**2
        return Pieces(0.0, work, work, 0.0, 0.0, 0.0)

    monkeypatch.setattr(module, "pieces", pieces)
    found, job = foreseen(made)
    wanted = [4 * Load.of(step[0], job.examples, 1, width).work + STEPPING for step in job.steps]
    assert len(lengths) == 2 and len(set(wanted)) > 2
    assert found.steps == pytest.approx(wanted)


def test_evaluation_and_saving(recipe: Make, measured: list[Any], tmp_path: Path) -> None:
    own = same_rows(tmp_path)
    own["data"]["eval"] = own["data"]["train"]
    made = recipe(**own, **{"train.steps": 5, "train.eval_every": 2, "train.checkpoint_every": 2})
    found, job = foreseen(made)
    assert found.evaluation == pytest.approx(3 * 8 * (0.5 + 2 * 1.0 + 0.003 * supervised(job)))  # after 2, 4 and 5
    trained = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))  # rank 4 on each linear layer of two blocks
    assert found.saving == pytest.approx((2 * 12 + 4) * trained / WRITTEN)
    assert found.total == pytest.approx(sum(found.steps) + found.evaluation + found.saving + found.loading)


@pytest.mark.parametrize(("seconds_a_block", "waits"), [(0.5, 0.0), (5.0, 1.0)])
def test_paged_weights_are_waited_for_where_the_disk_is_slower(
    seconds_a_block: float, waits: float, recipe: Make, measured: list[Any], tmp_path: Path, monkeypatch: Any
) -> None:
    made = recipe(
        **same_rows(tmp_path),
        **{"storage.name": "nf4", "train.recompute": True, "memory.page_weights": True, "train.tokens_per_step": 1},
    )
    block = base_bytes(checked(made).meta)["blocks"] / 2
    monkeypatch.setattr(module, "read_rate", lambda *_: block / seconds_a_block)
    monkeypatch.setattr(module, "BUFFERS", 1)  # of two blocks, one of each pass is there already
    found, _ = foreseen(made)
    assert found.disk == Disk(block / seconds_a_block, None)
    assert found.waits == ({"weights": pytest.approx((5.0 - 0.9) + (5.0 - 3.0))} if waits else {})
    without, _ = foreseen(made.model_copy(update={"memory": made.memory.model_copy(update={"page_weights": False})}))
    assert found.steps[0] - without.steps[0] == pytest.approx(found.waiting)


def test_paged_inputs_are_written_and_read_beside_the_blocks(
    recipe: Make, measured: list[Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """A disk that takes 2 s to write a block's input and 4 to read it; blocks take 0.9 and 3."""
    paged = {"train.recompute": True, "train.tokens_per_step": 1}
    made = recipe(**same_rows(tmp_path), **paged, **{"memory.page_activations": True})
    monkeypatch.setattr(module, "largest_input", lambda *_: 8)
    monkeypatch.setattr("veneer.plan.disk.scratch_rates", lambda *_: (4.0, 2.0))
    monkeypatch.setattr(module, "BUFFERS", 0)
    found, _ = foreseen(made)
    assert found.disk == Disk(2.0, 4.0)
    assert found.waits == {"activations": pytest.approx(2 * (2.0 - 0.9) + 2 * (4.0 - 3.0))}
    without, _ = foreseen(recipe(**same_rows(tmp_path), **paged))
    assert found.steps[0] - without.steps[0] == pytest.approx(found.waiting)
    assert len(measured) == 1  # where inputs lie changes nothing of what is timed


def test_state_without_room_is_moved_in_every_step(recipe: Make, measured: list[Any], tmp_path: Path) -> None:
    made = recipe(**same_rows(tmp_path), **{"optimizer.paged": True})
    found = estimate(checked(made), 100 << 20)
    state = found.disk["paged optimizer state"]
    roomy, tight = (foreseen(made, room)[0] for room in (1 << 40, found.peak_bytes))
    busy = state / WRITTEN + state / READ
    assert roomy.waits == {} and roomy.disk == Disk()
    assert tight.waits == ({"optimizer state": pytest.approx(busy - STEPPING)} if busy > STEPPING else {})
    assert tight.steps[0] == pytest.approx(roomy.steps[0] + max(busy - STEPPING, 0.0))
    assert tight.disk == Disk(READ, WRITTEN)


def test_loading_and_the_first_quantization(recipe: Make, measured: list[Any], tmp_path: Path) -> None:
    plain, _ = foreseen(recipe(**same_rows(tmp_path)))
    size = (Path(recipe().model) / "model.safetensors").stat().st_size
    assert plain.loading == pytest.approx(size / READ) and (plain.quantizing, plain.restarts) == (0.0, 0.0)
    made = recipe(**same_rows(tmp_path), **{"storage.name": "nf4"})
    fresh, _ = foreseen(made)
    linear = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    kept = sum(base_bytes(checked(made).meta)[part] for part in ("blocks", "rest"))
    assert fresh.quantizing == pytest.approx(linear * QUANTIZED + kept / WRITTEN)
    assert fresh.total == pytest.approx(sum(fresh.parts.values())) and fresh.parts["quantizing"] == fresh.quantizing


def test_every_restart_counts(recipe: Make, measured: list[Any], tmp_path: Path) -> None:
    again = {"restarts": {"every": 1}, "train.warmup": 0, "train.steps": 5}
    found, _ = foreseen(recipe(**same_rows(tmp_path), **again))
    assert found.restarts == pytest.approx(4 * checked(recipe()).adapter.n_params() * RESTARTED)


def test_what_was_measured_is_kept_by_what_it_depends_on(recipe: Make, measured: list[Any], tmp_path: Path) -> None:
    own = same_rows(tmp_path)
    foreseen(recipe(**own))
    foreseen(recipe(**own, **{"train.steps": 9, "optimizer.lr": 0.5}))
    assert len(measured) == 1
    for changes in ({"method": {"name": "lora", "rank": 2}}, {"storage.name": "nf4"}, {"train.recompute": True}):
        before = len(measured)
        foreseen(recipe(**own, **changes))
        assert len(measured) == before + 1, changes


def test_nothing_is_faked_with_a_real_clock(recipe: Make) -> None:
    told: list[int] = []
    made = checked(recipe())
    found = times(made, estimate(made, 1), told.append)
    assert 0 < found.seconds_a_step < 60 and 0 < found.saving < 60
    assert 3 <= len(told) <= most_runs(made.recipe)


@pytest.fixture
def clock_of(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """Of two blocks and rows that are all alike; nothing is measured."""
    monkeypatch.setattr(module, "pieces", lambda made, batch, recompute, ran: OTHER if recompute else PLAIN)
    monkeypatch.setattr(module, "BUFFERS", 0)
    file = tmp_path / "same.jsonl"
    file.write_text((json.dumps({"text": "the order of the count"}) + "\n") * 4)

    def make(**changes: Any) -> Clock:
        return Clock(checked(recipe(data={"train": str(file), "packing": False}, **changes)), lambda _: None)

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


@pytest.mark.parametrize(("recompute", "kinds"), [(False, 1), (True, 1), (1, 2), ((0,), 2)])
def test_runs_at_most(recompute: Any, kinds: int, recipe: Make) -> None:
    assert most_runs(recipe(**{"train.recompute": recompute})) == 2 * kinds * (1 + RUNS)


def rows(*lengths: int) -> list[Example]:
    return [Example(np.arange(n, dtype=np.int32), np.arange(n) >= n // 2, "rows", i) for i, n in enumerate(lengths)]


def test_work_counts_padding_of_tokens_and_of_documents() -> None:
    plain = Load.of([0, 1], rows(40, 20), 1, width=10)
    assert plain.work == 12 * 10 * 60 + 3 * 2 * 40**2
    assert Load.of([0, 1], rows(40, 20), 64, width=10).work - plain.work == 12 * 10 * 4
    assert Load.of([0, 1], rows(30, 30), 1, width=10).work < plain.work
    assert plain.supervised == len(collate(rows(40, 20)).targets) == 30


def test_a_first_token_is_no_target() -> None:
    whole = Example(np.arange(5, dtype=np.int32), np.ones(5, dtype=bool), "rows", 1)
    load = Load.of([0], [whole], 1, width=10)
    assert load.supervised == len(collate([whole]).targets) == 4


def test_those_alike_are_one_others_a_light_and_a_heavy_one() -> None:
    alike = [Load((i,), 100.0 + i, 5) for i in range(15)]
    assert representatives(alike) == [alike[7]]
    differing = [Load((i,), 100.0 * (i + 1), 5) for i in range(20)]
    assert representatives(differing) == [differing[2], differing[17]]
    assert representatives(differing[:2]) == differing[:2]


@pytest.mark.parametrize(
    ("points", "at", "seconds"),
    [
        ([(2.0, 6.0)], 4.0, 12.0),
        ([(2.0, 6.0), (4.0, 10.0)], 3.0, 8.0),
        ([(2.0, 6.0), (4.0, 10.0)], 6.0, 14.0),
        ([(2.0, 6.0), (4.0, 5.0)], 8.0, 6.0),  # noise: more work does not take less
        ([(2.0, 1.0), (4.0, 9.0)], 0.5, 0.0),
        ([(2.0, 6.0), (2.0, 7.0)], 2.0, 6.0),
    ],
)
def test_lines(points: list[tuple[float, float]], at: float, seconds: float) -> None:
    assert line_through(points)(at) == seconds


def test_seconds_of_a_step_are_near_those_of_a_run(
    recipe: Make, made_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Within a factor of 4, as other programs may run beside the test; counting a block too few times is more."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    deep = made_model(tmp_path / "deep", **shape)
    made = checked(recipe(model=str(deep), **{"train.steps": 6}))
    foreseen = times(made, estimate(made, 1)).steps
    taken: list[float] = []
    train_recipe(made.recipe, [lambda event: taken.append(event.figures["seconds"])])
    assert 0.25 < sum(foreseen[1:]) / sum(taken[1:]) < 4
