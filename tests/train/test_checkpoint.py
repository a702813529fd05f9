"""Checkpoints: whole or not at all, and everything the next step depends on."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import prepared
from veneer.disk.tensors import TensorWriter
from veneer.errors import DiskError, TrainingError
from veneer.recipe.settings import Recipe
from veneer.train.checkpoint import TrainState, load_checkpoint, save_checkpoint
from veneer.train.optim import build_optimizer
from veneer.train.setup import Training
from veneer.train.step import optimizer_step

Make = Callable[..., Recipe]


def begun(recipe: Recipe, steps: int = 0) -> tuple[Training, TrainState]:
    torch.manual_seed(0)
    job = prepared(recipe)
    state = TrainState(job.base, job.adapter, build_optimizer(job.adapter.named(), recipe.optimizer))
    go_on(recipe, job, state, steps)
    return job, state


def go_on(recipe: Recipe, job: Training, state: TrainState, steps: int) -> list[float]:
    job.adapter.train()
    return [optimizer_step(job, state)["loss"] for _ in range(steps)]


def everything(state: TrainState) -> list[Any]:
    moments = [dict(sorted(s.items())) for _, s in sorted(state.optimizer.state_dict()["state"].items())]
    tensors = [*state.adapter.parameters(), *(t for m in moments for t in m.values()), torch.get_rng_state()]
    return [t.detach().clone() for t in tensors]


@pytest.mark.parametrize("method", ["lora", "dora", "mora", "bitfit", "adalora"])
def test_a_restored_state_is_the_saved_one_and_goes_on_as_it_would_have(
    job: Make, tmp_path: Path, made_model: Any, method: str
) -> None:
    model = made_model(tmp_path / "model", attention_bias=True)
    recipe = job(method={"name": method, "targets": ["q_proj", "o_proj"]}, model=str(model))
    first, state = begun(recipe, 2)
    save_checkpoint(tmp_path / "step-2", state, "hash")
    saved = everything(state)
    losses = go_on(recipe, first, state, 2)

    second, other = begun(recipe)
    torch.rand(3)  # a session's own chance
    load_checkpoint(tmp_path / "step-2", other, "hash")
    assert all(torch.equal(a, b) for a, b in zip(saved, everything(other), strict=True))
    assert (other.step, other.tokens, other.seconds) == (2, other.tokens, other.seconds)
    assert go_on(recipe, second, other, 2) == losses
    assert all(torch.equal(a, b) for a, b in zip(everything(state), everything(other), strict=True))
    assert other.tokens == state.tokens


def test_8_bit_state_comes_back_to_the_bit(job: Make, tmp_path: Path) -> None:
    recipe = job(**{"optimizer.bits": 8})
    first, state = begun(recipe, 2)
    save_checkpoint(tmp_path / "step-2", state, "hash")
    losses = go_on(recipe, first, state, 2)
    second, other = begun(recipe)
    load_checkpoint(tmp_path / "step-2", other, "hash")
    assert go_on(recipe, second, other, 2) == losses
    assert all(torch.equal(a, b) for a, b in zip(everything(state), everything(other), strict=True))
    assert {t.dtype for t in load_file(tmp_path / "step-2" / "state.safetensors").values()} >= {torch.uint8}


def test_another_number_of_threads_is_said(job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, state = begun(job(), 1)
    save_checkpoint(tmp_path / "step-1", state, "hash")
    assert load_checkpoint(tmp_path / "step-1", state, "hash") is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    said = load_checkpoint(tmp_path / "step-1", state, "hash")
    assert said is not None and "began with OMP_NUM_THREADS=1, now there are 3 threads" in said
    facts = tmp_path / "step-1" / "state.json"
    older = {key: value for key, value in json.loads(facts.read_text()).items() if key != "threads"}
    facts.write_text(json.dumps(older))
    assert load_checkpoint(tmp_path / "step-1", state, "hash") is None, "an older checkpoint does not say"


@pytest.fixture
def saved(job: Make, tmp_path: Path) -> tuple[Path, TrainState]:
    _, state = begun(job(), 1)
    save_checkpoint(tmp_path / "step-1", state, "hash")
    return tmp_path / "step-1", state


def test_what_a_delta_keeps_beside_its_parameters_comes_back_too(job: Make, tmp_path: Path) -> None:
    """A restart may have moved MoRA's grouping on."""
    recipe = job(method={"name": "mora", "rank": 4})
    _, state = begun(recipe)
    for delta in state.adapter.deltas.values():
        for buffer in delta.buffers():
            buffer.copy_(torch.ones_like(buffer))
    save_checkpoint(tmp_path / "step-0", state, "hash")
    _, other = begun(recipe)
    load_checkpoint(tmp_path / "step-0", other, "hash")
    found = [b for delta in other.adapter.deltas.values() for b in delta.buffers()]
    assert found
    assert all(torch.equal(b, torch.ones_like(b)) for b in found)


def test_other_rows_are_refused_and_nothing_is_changed(saved: tuple[Path, TrainState]) -> None:
    folder, state = saved
    before = everything(state)
    with pytest.raises(
        TrainingError, match=r"rows are not those of checkpoint .*step-1; put the old file back, or start"
    ):
        load_checkpoint(folder, state, "another hash")
    assert all(torch.equal(a, b) for a, b in zip(before, everything(state), strict=True))


def test_another_base_is_refused(saved: tuple[Path, TrainState], job: Make) -> None:
    """The same shape and recipe, other weights: someone replaced the model's folder."""
    folder, state = saved
    with torch.no_grad():
        state.adapter.model.get_parameter("model.layers.0.mlp.up_proj.weight").add_(0.5)
    state = TrainState(state.base, state.adapter, state.optimizer)
    with pytest.raises(
        TrainingError, match=r"the base model's weights are not those of checkpoint .*step-1; put the old"
    ):
        load_checkpoint(folder, state, "hash")


def test_another_adapter_is_refused_by_its_parameters(saved: tuple[Path, TrainState], job: Make) -> None:
    folder, _ = saved
    _, other = begun(job(method={"name": "lora", "rank": 4, "targets": ["q_proj"]}))
    with pytest.raises(
        TrainingError, match=r"step-1 is of another adapter; these differ: parameter.model.layers.0.mlp"
    ):
        load_checkpoint(folder, other, "hash")
    _, other = begun(job(method={"name": "lora", "rank": 3}))
    with pytest.raises(TrainingError, match=r"these differ: parameter.model.layers.0.self_attn.q_proj:a"):
        load_checkpoint(folder, other, "hash")


@pytest.mark.parametrize("damage", ["cut", "no tensors", "no facts", "half facts", "no random state", "a list"])
def test_a_damaged_one_is_named(saved: tuple[Path, TrainState], damage: str) -> None:
    folder, state = saved
    tensors, facts = folder / "state.safetensors", folder / "state.json"
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-7])
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "no facts":
        facts.unlink()
    elif damage == "half facts":
        facts.write_text('{"step": 1}')
    elif damage == "a list":
        facts.write_text("[1]")
    else:
        save_file({k: t for k, t in load_file(tensors).items() if k != "random"}, tensors)
    before = everything(state)
    with pytest.raises(DiskError, match=r"step-1 cannot be read .*; remove it to go on from an earlier one, or from"):
        load_checkpoint(folder, state, "hash")
    assert all(torch.equal(a, b) for a, b in zip(before, everything(state), strict=True))


@pytest.mark.parametrize("where", ["tensors", "rename", "facts"])
def test_a_full_disk_leaves_the_earlier_one_whole(
    saved: tuple[Path, TrainState], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, state = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if where == "tensors":
            patch.setattr(TensorWriter, "write", full)
        elif where == "rename":
            patch.setattr(os, "replace", full)
        else:
            patch.setattr(json, "dumps", full)
        for name in ("step-1", "step-2"):
            with pytest.raises(DiskError, match=r"the disk is full: .*was not written"):
                save_checkpoint(folder.with_name(name), state, "hash")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir() if "step" in p.name] == ["step-1"]
    load_checkpoint(folder, state, "hash")


def test_it_is_readable_by_anyone(saved: tuple[Path, TrainState]) -> None:
    folder, state = saved
    tensors = load_file(folder / "state.safetensors")
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"parameter", "optimizer", "random"}
    assert sum(name.startswith("parameter.") for name in tensors) == len(state.adapter.named())
    facts = json.loads((folder / "state.json").read_text())
    assert (facts["step"], facts["data"]) == (1, "hash")
