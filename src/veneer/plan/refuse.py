"""Before the weights are read: refuse a run that cannot fit, instead of being ended by the system in the middle."""

from collections.abc import Callable

from veneer.errors import Refused, VeneerError
from veneer.plan.memory import certainly_too_large, estimate, room_for, verdict
from veneer.train.prepare import Check, Plan, Rows
from veneer.train.settings import Recipe


def refusing(say: Callable[[str], None], *, force: bool = False) -> Check:
    """A check for `train`: raises Refused for a run that will not fit; what may just fit is only said.

    force    say it and go on
    """

    def check(recipe: Recipe, rows: Rows, order: Plan) -> None:
        try:
            found = estimate(recipe, rows, order)
        except VeneerError as error:
            say(f"whether it fits is not known: {error}")
            return
        room = room_for(recipe)
        problems = verdict(found, room)
        if not problems:
            return
        if force or not certainly_too_large(found, room):
            for problem in problems:
                say(f"may not fit: {problem}")
            return
        raise Refused(
            "this run will not fit; nothing was loaded:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\n`veneer plan` shows the parts, and recipes that fit; --force trains all the same."
        )

    return check
