"""Activations in a scratch file: the same bytes back, its places used again, disk room taken before the first step."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import save_on_cpu

from veneer.base.device import Device
from veneer.disk.scratch import ENDING
from veneer.errors import ConfigError, DiskError
from veneer.recipe.settings import Recipe
from veneer.train import activation_offload
from veneer.train.activation_offload import ActivationFile
from veneer.train.job import read_job
from veneer.train.preflight import preflight
from veneer.train.run import open_run, train_recipe
from veneer.train.setup import set_up

Make = Callable[..., Recipe]
PAGED = {"train.recompute": True, "memory": {"page_activations": True}}


def chain(file: ActivationFile, x: torch.Tensor, depth: int) -> torch.Tensor:
    for _ in range(depth):
        with file.saving():
            x = x.exp().sin()  # saves exp's output, twice
    return x.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_equal_and_places_are_used_again(tmp_path: Path, dtype: torch.dtype) -> None:
    file = ActivationFile(tmp_path, 12, 2000)
    for seed in range(3):
        start = torch.randn(10, 40, generator=torch.Generator().manual_seed(seed)).to(dtype)
        one, two = (start.clone().requires_grad_() for _ in range(2))
        chain(file, one, 6).backward()  # type: ignore[no-untyped-call]
        plain = two
        for _ in range(6):
            plain = plain.exp().sin()
        plain.sum().backward()  # type: ignore[no-untyped-call]
        assert torch.equal(one.grad, two.grad)  # type: ignore[arg-type]
        assert len(file.free) == 12
    assert file.stored == 36 and file.nbytes == 12 * 4096
    file.close()


def test_tensors_without_a_place_stay_in_memory(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path, 2, 400)
    one = torch.ones(10, 10, requires_grad=True)
    chain(file, one, 3).backward()  # type: ignore[no-untyped-call]
    big = torch.ones(2000, requires_grad=True)
    chain(file, big, 1).backward()  # type: ignore[no-untyped-call]
    assert file.stored == 2 and torch.isfinite(one.grad).all()  # type: ignore[arg-type]
    file.close()


def test_a_failing_write_reaches_the_training_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = ActivationFile(tmp_path, 12, 2000)
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(DiskError, match=f"the disk is full: a scratch file in {tmp_path}"):
        chain(file, torch.ones(10, requires_grad=True), 6).backward()  # type: ignore[no-untyped-call]
    file.close()


def test_a_run_is_the_same_and_leaves_nothing(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[ActivationFile] = []
    real = ActivationFile.__init__

    def seen(self: ActivationFile, *args: object) -> None:
        real(self, *args)  # type: ignore[arg-type]
        files.append(self)

    monkeypatch.setattr(ActivationFile, "__init__", seen)
    plain, _ = train_recipe(job("plain", **{"train.recompute": True}))
    recipe = job("paged", **PAGED)
    Path(recipe.run).mkdir()
    (Path(recipe.run) / f".dead{ENDING}").write_bytes(b"left by a killed run")
    paged, done = train_recipe(recipe)
    assert done is not None and len(files) == 1
    micro_batches = sum(len(step) for step in done.job.steps)
    assert files[0].stored == 2 * micro_batches  # 2 blocks
    one, two = (Path(o.adapter, "adapter_model.safetensors").read_bytes() for o in (plain, paged))
    assert one == two
    assert not list(Path(recipe.run).rglob(f"*{ENDING}"))


def test_off_the_cpu_they_are_kept_in_host_memory(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a CPU goes: everything passes through torch's own hooks, nothing through a file, and the run is the
    same, bit for bit."""
    plain, _ = train_recipe(job("plain", **{"train.recompute": True}))
    asked: list[bool] = []
    real = save_on_cpu.__init__

    def seen(self: save_on_cpu, pin_memory: bool = False) -> None:
        asked.append(pin_memory)
        real(self, pin_memory)

    monkeypatch.setattr(save_on_cpu, "__init__", seen)
    monkeypatch.setattr(Device, "is_cpu", False)
    monkeypatch.setattr(activation_offload, "ActivationFile", None)
    with open_run(job("pinned", **PAGED)) as session:
        done = set_up(preflight(read_job(session.recipe)))
        monkeypatch.setattr(Device, "random_state", lambda self: {"random": torch.get_rng_state()})
        pinned = session.train(done)
    assert asked == [False] * 2 * sum(len(step) for step in done.job.steps)  # 2 blocks, not on CUDA
    one, two = (Path(o.adapter, "adapter_model.safetensors").read_bytes() for o in (plain, pinned))
    assert one == two


def test_a_disk_without_room_ends_before_the_first_step(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offload, "PAGE", 1 << 58)
    recipe = job(**PAGED)
    with pytest.raises(DiskError, match=r"the disk is full|failed"):
        train_recipe(recipe)
    assert not (Path(recipe.run) / "events.jsonl").read_text()


@pytest.mark.parametrize("key", ["page_weights", "page_activations"])
def test_paging_needs_recomputing(job: Make, key: str) -> None:
    with pytest.raises(ConfigError, match=f"memory.{key} is true, but train.recompute is false"):
        job(memory={key: True})
