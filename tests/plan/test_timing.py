"""Blocks and the optimizer are timed by the code that trains, on synthetic weights, and timings are cached."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.plan.checked import checked
from veneer.base.load import load_model
from veneer.base.storage_config import base_storage
from veneer.kernels import native
from veneer.models.blocks import blocks_of
from veneer.plan import timing
from veneer.plan.meta_model import short_model
from veneer.plan.timing import (
    Pieces,
    cached,
    facts,
    optimizer_seconds,
    pieces,
    quantizing_seconds,
    restart_seconds,
    synthetic_model,
)
from veneer.plan.trace import largest_batches
from veneer.recipe.settings import Recipe
from veneer.train.preflight import Checked
from veneer.train.restarts import Restarts

Make = Callable[..., Recipe]


def timed(made: Checked, recompute: bool = False, ran: Any = lambda _: None) -> Pieces:
    batch = largest_batches(made, made.job.examples, made.job.steps, rounded=True)[0]
    return pieces(made, batch, recompute, ran)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"storage.name": "nf4", "train.recompute": True},
        {"train.recompute": True, "memory.page_activations": True},
        {"data.packing": False},
        {"method": {"name": "adalora"}},
        {"method": {"name": "none"}, "prompt": {"name": "prefix"}},
        {"prompt": {"name": "prompt"}},
        {"method": {"name": "lora", "init": "eva"}},
        {"optimizer.in_backward": True, "train.tokens_per_step": 128, "train.micro_batch_tokens": None},
    ],
)
def test_every_kind_of_recipe_is_timed(changes: dict[str, Any], recipe: Make) -> None:
    made = checked(recipe(**changes))
    found = timed(made, recompute=made.recipe.train.recompute is True)
    for name in ("forward", "backward", "head", "head_forward"):
        assert getattr(found, name) > 0, name
    assert found.change >= 0 and found.outside >= 0  # of tiny blocks, the difference may be none


def test_runs_are_told_and_end_when_there_are_enough(recipe: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr(timing, "ENOUGH", 0.0)
    told: list[int] = []
    timed(checked(recipe()), ran=told.append)
    assert told == [1, 1, 1]  # one for warm-up, two that count


def test_larger_blocks_take_longer(recipe: Make, made_model: Callable[..., Path], tmp_path: Path) -> None:
    wide = made_model(tmp_path / "wide", hidden_size=512, intermediate_size=2048)
    small, large = (timed(checked(recipe(model=str(model)))) for model in (recipe().model, wide))
    assert large.forward > 2 * small.forward and large.backward > 2 * small.backward


def test_recomputed_blocks_take_longer_backward(recipe: Make, made_model: Callable[..., Path], tmp_path: Path) -> None:
    wide = str(made_model(tmp_path / "wide", hidden_size=512, intermediate_size=2048))
    kept, again = (timed(checked(recipe(model=wide, **{"train.recompute": r})), recompute=r) for r in (False, True))
    assert again.backward > 1.1 * kept.backward


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer.bits": 8},
        {"optimizer.in_backward": True, "train.tokens_per_step": 128, "train.micro_batch_tokens": None},
        {"optimizer": {"name": "sgd", "momentum": 0.9}},
        {"optimizer": {"name": "adafactor"}},
    ],
)
def test_seconds_of_every_optimizer(changes: dict[str, Any], recipe: Make, tmp_path: Path) -> None:
    made = checked(recipe(**changes))
    like = short_model(made, 2)[1].named()
    assert 0 < optimizer_seconds(made.recipe, like, 50_000, tmp_path, paged=False) < 1


def test_more_numbers_than_are_stepped_take_longer_in_proportion(
    recipe: Make, tmp_path: Path, monkeypatch: Any
) -> None:
    like = short_model(checked(recipe()), 2)[1].named()
    have = sum(n.parameter.numel() for n in like)
    monkeypatch.setattr(timing, "STEPPED", 2 * have)
    ticks = iter(range(1000))
    monkeypatch.setattr("veneer.plan.timing.time.perf_counter", lambda: next(ticks))
    made: list[int] = []
    real = timing.build_optimizer

    def build(named: Any, *rest: Any) -> Any:
        made.append(sum(n.parameter.numel() for n in named))
        return real(named, *rest)

    monkeypatch.setattr(timing, "build_optimizer", build)
    assert optimizer_seconds(recipe(), like, 10 * have, tmp_path, paged=False) == 5.0  # a tick for 2 of 10
    assert optimizer_seconds(recipe(), like, have, tmp_path, paged=False) == 1.0
    assert made == [2 * have, have]


def test_paged_state_lies_in_the_folder(recipe: Make, tmp_path: Path, monkeypatch: Any) -> None:
    like = short_model(checked(recipe()), 2)[1].named()
    folders: list[Path] = []

    def never(folder: Path, nbytes: int) -> None:
        folders.append(folder)
        raise InterruptedError

    monkeypatch.setattr("veneer.train.optim.adamw.Pages", never)
    with pytest.raises(InterruptedError):
        optimizer_seconds(recipe(), like, 1000, tmp_path, paged=True)
    assert folders == [tmp_path]


@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
def test_shapes_are_those_of_the_loaded_model(storage: str, recipe: Make) -> None:
    wanted = recipe(**{"storage.name": storage})
    model = synthetic_model(checked(wanted)).network
    real = load_model(wanted.model, storage=base_storage(wanted.storage.model_dump()), dtype="float32").network
    shapes, wanted_shapes = (
        {n: (t.shape, t.dtype) for n, t in [*m.named_parameters(), *m.named_buffers()]} for m in (model, real)
    )
    assert shapes == wanted_shapes
    assert not any(t.is_meta or t.requires_grad for t in [*model.parameters(), *model.buffers()])
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    assert bool(logits.isfinite().all()) and float(logits.std()) > 0.01


def test_tied_weights_stay_one(recipe: Make) -> None:
    model = synthetic_model(checked(recipe())).network
    tied = load_model(recipe().model, storage=None, dtype="float32").network
    same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert same == (tied.get_input_embeddings().weight is tied.get_output_embeddings().weight)


def test_the_first_block_differentiates_its_input(recipe: Make) -> None:
    model = synthetic_model(checked(recipe())).network
    inputs: list[torch.Tensor] = []
    next(iter(blocks_of(model).values())).register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(torch.arange(8)[None]).logits.sum().backward()
    assert inputs[0].grad is not None and float(inputs[0].grad.abs().sum()) > 0


def test_where_things_are_kept_is_no_fact_about_a_block(recipe: Make) -> None:
    again = {"train.recompute": True}
    kept, paged = (facts(checked(recipe(**again, **{"memory.page_activations": p}))) for p in (False, True))
    assert kept == paged != facts(checked(recipe(**again, method={"name": "ia3"})))


def test_a_run_that_trims_the_heap_is_timed_by_itself(recipe: Make) -> None:
    """The heap is trimmed once any block is recomputed, while those that are not are timed too."""
    assert facts(checked(recipe())) != facts(checked(recipe(**{"train.recompute": 1})))


def test_seconds_with_other_kernels_are_others(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [checked(recipe(**c)) for c in ({}, {"storage": {"name": "nf4"}}, {"optimizer.bits": 8})]
    found = []
    for isa in ("avx512", None):
        status = native.Status(isa is not None, None, isa, "")
        monkeypatch.setattr(native, "status", lambda status=status: status)
        found.append([facts(one) for one in made])
    assert [one == other for one, other in zip(*found, strict=True)] == [True, False, False]


@pytest.fixture
def measure() -> Callable[[], dict[str, float]]:
    made = iter(range(100))
    return lambda: {"step": float(next(made))}


def test_measured_once_for_the_same_facts(measure: Callable[[], dict[str, float]], tmp_path: Path) -> None:
    assert [cached({"rank": r}, measure)["step"] for r in (8, 8, 16, 8)] == [0.0, 0.0, 1.0, 0.0]
    files = list((tmp_path / "cache" / "timings").iterdir())
    assert len(files) == 2
    assert json.loads(files[0].read_text())["here"]["threads"] == torch.get_num_threads()


def test_other_threads_or_versions_are_measured_again(
    measure: Callable[[], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached({}, measure)["step"] == 0.0
    monkeypatch.setattr(timing, "version", lambda name: "next")
    assert cached({}, measure)["step"] == 1.0
    monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    assert cached({}, measure)["step"] == 2.0


@pytest.mark.parametrize("text", ["", "[]", '{"seconds": {"step": "long"}}', '{"other": 1}'])
def test_a_damaged_file_is_measured_again(text: str, measure: Callable[[], dict[str, float]], tmp_path: Path) -> None:
    cached({}, measure)
    (file,) = (tmp_path / "cache" / "timings").iterdir()
    file.write_text(text)
    assert cached({}, measure)["step"] == 1.0


def test_a_cache_that_cannot_be_written_only_costs_time(
    measure: Callable[[], dict[str, float]], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file in the folder's place")
    assert [cached({}, measure)["step"] for _ in range(2)] == [0.0, 1.0]


def test_a_number_costs_what_its_blocks_layers_took(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = checked(recipe(**{"storage.name": "nf4"}))
    ticks = iter(range(10**6))
    monkeypatch.setattr("veneer.plan.timing.time.perf_counter", lambda: float(next(ticks)))
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32  # query and output, key and value, the three of the MLP
    assert quantizing_seconds(made) == 7 / block  # seven layers, a tick each


@pytest.mark.parametrize(
    "changes", [{}, {"storage.name": "nf4"}, {"method": {"name": "mora", "rank": 2, "variant": "sharing"}}]
)
def test_a_restart_in_the_middle_of_the_run_is_timed(
    changes: dict[str, Any], recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[int] = []
    real = Restarts.restart_

    def seen(self: Restarts, optimizer: Any, step: int) -> Any:
        deltas = self._adapter.deltas.values()
        finished.append(step if all(delta.past for delta in deltas) else 0)
        return {**real(self, optimizer, step), "seconds": 10.0}

    monkeypatch.setattr(Restarts, "restart_", seen)
    made = checked(recipe(restarts={"every": 2}, **{"train.warmup": 0, "train.steps": 11}, **changes))
    found = restart_seconds(made)  # after 2, 4, 6, 8 and 10 steps
    assert finished == [6]
    assert found == 10.0 / made.adapter.n_params()
