"""The way of one run to its first step: which rooms it enters, in the order of the house."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.e2e.conftest import recipe_text
from tests.test_architecture import RANK, ROOT
from veneer.cli.main import invoke

HANDED_IN = {
    *{("cli", name) for name in ("remark", "_add", "__call__")},  # remarks and the progress bar of the command
    *{("base", "__torch_dispatch__"), ("plan", "__torch_function__"), ("base", "_drop")},  # modes that count memory
    *{("storage", "__post_init__"), ("methods", "__post_init__")},  # a settings class checks its own values
    *{("base", "__call__"), ("base", "accepts")},  # storages without data, in the place of real ones
    *{("plan", "run"), ("plan", "<lambda>"), ("train", "_take")},  # hooks on blocks and on gradients
}
"""What a room further right has given away to be called: it is named here, or it is a call against the order."""


def room_of(frame: FrameType) -> str | None:
    """The room that a frame's code stands in; None for code that is not ours."""
    file = Path(frame.f_code.co_filename)
    return file.relative_to(ROOT).parts[0].removesuffix(".py") if file.is_relative_to(ROOT) else None


class Trace:
    """Every call of our functions with the room of the nearest of ours that it came from."""

    def __init__(self) -> None:
        self.calls: set[tuple[str, str, str]] = set()
        """Caller's room, room, function."""

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or (room := room_of(frame)) is None:
            return
        above = frame.f_back
        while above is not None and room_of(above) is None:
            above = above.f_back
        caller = None if above is None else room_of(above)
        if caller is not None and caller != room:
            self.calls.add((caller, room, frame.f_code.co_name))

    def against_the_order(self) -> set[tuple[str, str, str]]:
        """Calls from a room into one further right."""
        ranked = {call for call in self.calls if {call[0], call[1]} <= RANK.keys()}
        return {(a, b, name) for a, b, name in ranked if RANK[b] > RANK[a] and (b, name) not in HANDED_IN}


@pytest.mark.parametrize("settings", [{}, {"storage.name": "nf4"}], ids=["dense", "nf4"])
def test_no_room_is_entered_from_its_left(home: Path, tiny_model: Path, settings: dict[str, Any]) -> None:
    Path("recipe.yaml").write_text(recipe_text(tiny_model, **{"train.steps": 1, **settings}), encoding="utf-8")
    trace = Trace()
    sys.setprofile(trace)
    try:
        assert invoke(["train", "recipe.yaml"]) == 0
    finally:
        sys.setprofile(None)
    assert {("cli", "train"), ("train", "base"), ("train", "adapters")} <= {(a, b) for a, b, _ in trace.calls}
    assert not (against := sorted(trace.against_the_order())), "\n".join(map(str, against))


def test_a_call_against_the_order_would_be_seen() -> None:
    trace = Trace()
    trace.calls = {("base", "train", "read_job"), ("train", "base", "load_model"), ("train", "cli", "remark")}
    assert trace.against_the_order() == {("base", "train", "read_job")}
