"""Before the weights are read: refuse a run that cannot fit, or pick the cheapest change that does (`memory.auto`)."""

from collections.abc import Callable
from dataclasses import dataclass

from veneer.errors import Refused, VeneerError
from veneer.plan.alternatives import Fit, nearest
from veneer.plan.memory import Estimate, estimate
from veneer.plan.room import Room, certainly_too_large, room_for, verdict
from veneer.train.preflight import Checked
from veneer.units import format_bytes


@dataclass(frozen=True)
class Fitting:
    """A job's estimate held against the room there is."""

    checked: Checked
    found: Estimate
    room: Room
    problems: list[str]
    """Empty if it fits."""

    @classmethod
    def of(cls, checked: Checked) -> "Fitting":
        """Raises ModelError for a model that cannot be traced."""
        found, room = estimate(checked), room_for(checked.recipe)
        return cls(checked, found, room, verdict(found, room))

    def nearest(self) -> list[Fit]:
        """The nearest recipes that fit."""
        return nearest(self.checked, self.room, self.found.parts["runtime"])


def fit(checked: Checked, *, fixed: bool = False, force: bool = False, say: Callable[[str], None]) -> Checked:
    """Return the job if it fits; with `memory.auto`, with the cheapest change that does, which is said.

    fixed   a run has begun with this recipe, so it stays
    force   say what does not fit, and go on
    Raises Refused for a run that will not fit.  A run that may fit, and one whose model cannot be traced, is only said.
    """
    picking = checked.recipe.memory.auto and not fixed
    try:
        fitting = Fitting.of(checked)
    except VeneerError as error:
        if picking and not force:
            raise Refused(f"memory.auto has no estimate to go by, set it to false, or force=True: {error}") from error
        say(f"whether it fits is not known: {error}")
        return checked
    problems = fitting.problems
    if not problems:
        return checked
    if picking and (fits := fitting.nearest()):
        say("\n".join(["it would not fit:", *[f"  {problem}" for problem in problems]]))
        say(f"memory.auto picks {fits[0].flags} ({format_bytes(fits[0].found.peak_bytes)} at the peak)")
        return fits[0].checked
    if force or not certainly_too_large(fitting.found, fitting.room):
        for problem in problems:
            say(f"may not fit: {problem}")
        return checked
    raise Refused(
        "this run will not fit; nothing was loaded:\n"
        + "\n".join(f"  {problem}" for problem in problems)
        + "\n`veneer plan` shows the parts, and recipes that fit; force=True trains all the same."
    )
