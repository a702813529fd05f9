"""Events as lines, and as TensorBoard's scalars."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from veneer.train import events
from veneer.train.events import Event, tensorboard

EVENT = Event("step", 3, 10, {"loss": 1.5, "lr": {"in": 0.1, "out": 0.4}})


def test_an_event_is_one_flat_object() -> None:
    assert EVENT.line() == {"event": "step", "step": 3, "steps": 10, "loss": 1.5, "lr": {"in": 0.1, "out": 0.4}}


def test_without_tensorboard_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "find_spec", lambda name: None)
    assert tensorboard(tmp_path / "tensorboard") is None
    assert not (tmp_path / "tensorboard").exists()


def test_with_tensorboard_every_figure_is_a_scalar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            written.append((tag, value, step))

        def flush(self) -> None:
            written.append("flush")

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(events, "find_spec", lambda name: object())
    listener = tensorboard(tmp_path, after=2)
    assert listener is not None
    listener(EVENT)
    assert written == [
        (str(tmp_path), 3),  # what an earlier session wrote from step 3 on is hidden
        ("step/loss", 1.5, 3),
        ("step/lr/in", 0.1, 3),
        ("step/lr/out", 0.4, 3),
        "flush",
    ]
