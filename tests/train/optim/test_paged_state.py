"""State in a scratch file: the same numbers, also where memory is short, and nothing left behind."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from veneer import machine
from veneer.adapters.part import NamedParameter
from veneer.errors import DiskError
from veneer.recipe.settings import OptimizerSettings
from veneer.train.optim import adamw, build_optimizer, paged_state
from veneer.train.optim.adamw import FlatAdamW


def stepped(settings: OptimizerSettings, folder: Path) -> tuple[list[torch.Tensor], FlatAdamW]:
    rng = torch.Generator().manual_seed(0)
    sizes = [("a", "in", (50, 333)), ("b", "out", (7000,)), ("s", "scale", (300,))]
    named = [NamedParameter("layer", n, r, nn.Parameter(torch.randn(s, generator=rng))) for n, r, s in sizes]  # type: ignore[arg-type]
    optimizer = build_optimizer(named, settings, folder)
    assert isinstance(optimizer, FlatAdamW)
    for _ in range(3):
        for n in named:
            n.parameter.grad = torch.randn(n.parameter.shape, generator=rng)
        optimizer.step()
    state = [t for n in named for t in optimizer.state[n.parameter].values()]
    return [*(n.parameter.detach() for n in named), *state], optimizer


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("short", [False, True])
def test_paged_is_unpaged_bit_for_bit(bits: int, short: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = OptimizerSettings(lr=1e-2).model_copy(update={"bits": bits})
    plain, unpaged = stepped(settings.model_copy(update={"paged": False}), tmp_path)
    monkeypatch.setattr(adamw, "CHUNK", 1024)
    dropped: list[int] = []
    fadvise = os.posix_fadvise

    def counted(handle: int, start: int, size: int, advice: int) -> None:
        dropped.append(size)
        fadvise(handle, start, size, advice)

    monkeypatch.setattr(os, "posix_fadvise", counted)
    monkeypatch.setattr(machine, "available_bytes", lambda: 0 if short else 2**40)
    other, paged = stepped(settings.model_copy(update={"paged": True}), tmp_path)
    assert unpaged.pages is None and paged.pages is not None
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    assert bool(dropped) == short
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_auto_pages_what_would_take_half_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = stepped(OptimizerSettings(), tmp_path)
    assert plain.pages is None
    monkeypatch.setattr(machine, "available_bytes", lambda: 300_000)
    _, paged = stepped(OptimizerSettings(), tmp_path)
    assert paged.pages is not None


def test_a_full_disk_is_an_error_before_training(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"the disk is full: a scratch file in .* needs .*, .* are free"):
        paged_state.Pages(tmp_path, 2**58)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.disk.scratch.filesystem_of", lambda folder: "tmpfs")
    with pytest.raises(DiskError, match=r"optimizer.paged: .* is a tmpfs, which is in memory; put the run on a disk"):
        paged_state.Pages(tmp_path, 4096)
