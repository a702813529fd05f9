"""Seconds are put together from their pieces, for every micro-batch as its rows fill it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.plan import batch_time
from veneer.plan import time as module
from veneer.plan.batch_time import most_runs
from veneer.plan.block_timing import Pieces
from veneer.plan.io_time import Disk
from veneer.plan.memory import estimate
from veneer.plan.meta_model import Plain
from veneer.plan.time import Times, times
from veneer.plan.workload import load_of
from veneer.recipe.settings import Recipe
from veneer.train.job import order_of_steps, read_job

Make = Callable[..., Recipe]
PLAIN = Pieces(outside=0.5, forward=1.0, backward=2.0, head=0.01, head_forward=0.003, change=0.1)
AGAIN = Pieces(outside=0.5, forward=0.9, backward=3.0, head=0.01, head_forward=0.003, change=0.1)
STEPPING, WRITTEN, READ, QUANTIZED, HASHED, RESTARTED = 0.25, 1e6, 3e6, 1e-3, 1e-5, 1e-4


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every measurement has a fixed result; the batches that were timed are collected."""
    batches: list[Any] = []

    def pieces(plain: Any, batch: Any, again: bool, *_: Any) -> Pieces:
        batches.append(batch)
        return AGAIN if again else PLAIN

    monkeypatch.setattr(batch_time, "pieces", pieces)
    monkeypatch.setattr(module, "optimizer_seconds", lambda *_, **__: STEPPING)
    monkeypatch.setattr(module, "write_rate", lambda _: WRITTEN)
    monkeypatch.setattr(module, "read_rate", lambda *_: READ)
    monkeypatch.setattr("veneer.plan.io_time.scratch_rates", lambda *_: (WRITTEN, READ))
    monkeypatch.setattr(module, "quantizing_seconds", lambda *_: QUANTIZED)
    monkeypatch.setattr(module, "hashing_seconds", lambda: HASHED)
    monkeypatch.setattr(module, "restarting_seconds", lambda *_: RESTARTED)
    return batches


def foreseen(recipe: Recipe) -> tuple[Times, Any, Any]:
    rows = read_job(recipe)
    order = order_of_steps([len(e) for e in rows.examples], recipe.train, packing=recipe.data.packing)
    found = estimate(recipe, rows, order, 100 << 20)
    return times(recipe, rows, order, found), rows, order


def same_rows(folder: Path, count: int = 8) -> dict[str, Any]:
    """As many rows of one length, each a micro-batch of its own, all of it trained."""
    file = folder / "same.jsonl"
    file.write_text("".join(json.dumps({"text": "the order of the count"}) + "\n" for _ in range(count)))
    return {"data": {"train": str(file), "text": "{text}", "packing": False}}


def supervised(rows: Any) -> int:
    return len(rows.examples[0]) - 1


def test_a_step_of_like_micro_batches(recipe: Make, measured: list[Any], tmp_path: Path) -> None:
    found, rows, order = foreseen(recipe(**same_rows(tmp_path), **{"train.tokens_per_step": 10_000}))
    body = 0.5 + 2 * (1.0 + 2.0) + 0.01 * supervised(rows)
    assert len(measured) == 1 and [len(step) for step in order] == [8, 8]
    assert found.steps == pytest.approx([8 * body + 2 * 0.1 + STEPPING] * 2)
    assert found.seconds_a_step == pytest.approx(found.steps[0])


def test_recomputed_blocks_are_timed_by_themselves(recipe: Make, measured: list[Any], tmp_path: Path) -> None:
    made = recipe(**same_rows(tmp_path), **{"train.recompute": 1, "train.steps": 1, "train.tokens_per_step": 1})
    found, rows, _ = foreseen(made)
    assert len(measured) == 2
    assert found.steps[0] == pytest.approx(
        0.5 + (1.0 + 2.0) + (0.9 + 3.0) + 0.01 * supervised(rows) + 2 * 0.1 + STEPPING
    )


def test_gradients_used_at_once_take_two_passes_where_they_are_clipped(
    recipe: Make, measured: list[Any], tmp_path: Path
) -> None:
    one = {**same_rows(tmp_path), "train.steps": 1, "train.tokens_per_step": 1, "optimizer.in_backward": True}
    (clipped, _, _), (free, _, _) = (foreseen(recipe(**one, **{"train.clip": c})) for c in (1.0, 0.0))
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

    monkeypatch.setattr(batch_time, "pieces", pieces)
    found, rows, order = foreseen(made)
    wanted = [4 * load_of(step[0], rows.examples, 1, width).work + STEPPING for step in order]
    assert len(lengths) == 2 and len(set(wanted)) > 2
    assert found.steps == pytest.approx(wanted)


def test_evaluation_and_saving(recipe: Make, measured: list[Any], tmp_path: Path) -> None:
    own = same_rows(tmp_path)
    own["data"]["eval"] = own["data"]["train"]
    made = recipe(**own, **{"train.steps": 5, "train.eval_every": 2, "train.checkpoint_every": 2})
    found, rows, _ = foreseen(made)
    assert found.evaluation == pytest.approx(3 * 8 * (0.5 + 2 * 1.0 + 0.003 * supervised(rows)))  # after 2, 4 and 5
    trained = sum(n.parameter.numel() for n in Plain.of(made).change(Plain.of(made).model(2)).named())
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
    plain = Plain.of(made)
    block = module.base_bytes(plain.model())["blocks"] / 2
    monkeypatch.setattr(module, "read_rate", lambda *_: block / seconds_a_block)
    monkeypatch.setattr(batch_time, "BUFFERS", 1)  # of two blocks, one of each pass is there already
    found, _, _ = foreseen(made)
    assert found.disk == Disk(block / seconds_a_block, None)
    assert found.waits == ({"weights": pytest.approx((5.0 - 0.9) + (5.0 - 3.0))} if waits else {})
    without, _, _ = foreseen(made.model_copy(update={"memory": made.memory.model_copy(update={"page_weights": False})}))
    assert found.steps[0] - without.steps[0] == pytest.approx(found.waiting)


def test_paged_inputs_are_written_and_read_beside_the_blocks(
    recipe: Make, measured: list[Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """A disk that takes 2 s to write a block's input and 4 to read it; blocks take 0.9 and 3."""
    paged = {"train.recompute": True, "train.tokens_per_step": 1}
    made = recipe(**same_rows(tmp_path), **paged, **{"memory.page_activations": True})
    monkeypatch.setattr(module, "largest_input", lambda *_: 8)
    monkeypatch.setattr("veneer.plan.io_time.scratch_rates", lambda *_: (4.0, 2.0))
    monkeypatch.setattr(batch_time, "BUFFERS", 0)
    found, _, _ = foreseen(made)
    assert found.disk == Disk(2.0, 4.0)
    assert found.waits == {"activations": pytest.approx(2 * (2.0 - 0.9) + 2 * (4.0 - 3.0))}
    without, _, _ = foreseen(recipe(**same_rows(tmp_path), **paged))
    assert found.steps[0] - without.steps[0] == pytest.approx(found.waiting)
    assert len(measured) == 1  # where inputs lie changes nothing of what is timed


def test_state_without_room_is_moved_in_every_step(recipe: Make, measured: list[Any], tmp_path: Path) -> None:
    made = recipe(**same_rows(tmp_path), **{"optimizer.paged": True})
    rows = read_job(made)
    order = order_of_steps([len(e) for e in rows.examples], made.train, packing=False)
    found = estimate(made, rows, order, 100 << 20)
    state = found.disk["paged optimizer state"]
    roomy, tight = (times(made, rows, order, found, room=room) for room in (1 << 40, found.peak_bytes))
    busy = state / WRITTEN + state / READ
    assert roomy.waits == {} and roomy.disk == Disk()
    assert tight.waits == ({"optimizer state": pytest.approx(busy - STEPPING)} if busy > STEPPING else {})
    assert tight.steps[0] == pytest.approx(roomy.steps[0] + max(busy - STEPPING, 0.0))
    assert tight.disk == Disk(READ, WRITTEN)


def test_loading_and_the_first_quantization(recipe: Make, measured: list[Any], tmp_path: Path) -> None:
    plain, _, _ = foreseen(recipe(**same_rows(tmp_path)))
    size = (Path(recipe().model) / "model.safetensors").stat().st_size
    assert plain.loading == pytest.approx(size / READ) and (plain.quantizing, plain.restarts) == (0.0, 0.0)
    made = recipe(**same_rows(tmp_path), **{"storage.name": "nf4"})
    fresh, _, _ = foreseen(made)
    linear = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    kept = sum(module.base_bytes(Plain.of(made).model())[part] for part in ("blocks", "rest"))
    assert fresh.quantizing == pytest.approx(linear * QUANTIZED + kept / WRITTEN + kept * HASHED)
    assert fresh.total == pytest.approx(sum(fresh.parts.values())) and fresh.parts["quantizing"] == fresh.quantizing


def test_every_restart_counts(recipe: Make, measured: list[Any], tmp_path: Path) -> None:
    again = {"restarts": {"every": 1}, "train.warmup": 0, "train.steps": 5}
    found, _, _ = foreseen(recipe(**same_rows(tmp_path), **again))
    trained = sum(Plain.of(recipe()).trained(Plain.of(recipe()).model()))
    assert found.restarts == pytest.approx(4 * trained * RESTARTED)


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
    made = recipe()
    rows = read_job(made)
    order = order_of_steps([len(e) for e in rows.examples], made.train, packing=True)
    found = times(made, rows, order, estimate(made, rows, order, 1), told.append)
    assert 0 < found.seconds_a_step < 60 and 0 < found.saving < 60
    assert 3 <= len(told) <= most_runs(made)
