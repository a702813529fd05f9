"""Before the weights are read: refuse a run that cannot fit, instead of being ended by the system in the middle."""

from collections.abc import Callable
from contextlib import suppress

from veneer.errors import ModelError, Refused, VeneerError
from veneer.plan.alternatives import nearest
from veneer.plan.memory import certainly_too_large, estimate, room_for, verdict
from veneer.plan.preflight import check_sound
from veneer.recipe.overrides import with_changes
from veneer.recipe.settings import Recipe
from veneer.train.setup import Check, Plan, Rows
from veneer.units import format_bytes


def refusing(say: Callable[[str], None], *, force: bool = False) -> Check:
    """A check for `train`: raises Refused for a run that will not fit; what may just fit is only said.

    What training would refuse after loading is refused here, before (`sound`).

    With `memory.auto` it returns the recipe with the cheapest change that fits, and says which; only where there is
    none is the run refused.
    force    say it and go on
    """

    def check(recipe: Recipe, rows: Rows, order: Plan, begun: bool) -> Recipe:
        with suppress(ModelError):  # not to be followed without weights: said below
            check_sound(recipe, rows, order)
        picking = recipe.memory.auto and not begun
        try:
            found = estimate(recipe, rows, order)
        except VeneerError as error:
            if picking and not force:
                raise Refused(f"memory.auto has nothing to go by, set it to false or use --force: {error}") from error
            say(f"whether it fits is not known: {error}")
            return recipe
        room = room_for(recipe)
        problems = verdict(found, room)
        if not problems:
            return recipe
        if picking and (fits := nearest(recipe, rows, room, found.parts["runtime"])):
            say("\n".join(["it would not fit:", *[f"  {problem}" for problem in problems]]))
            say(f"memory.auto picks {fits[0].flags} ({format_bytes(fits[0].found.peak_bytes)} at the peak)")
            return with_changes(recipe, fits[0].changes)
        if force or not certainly_too_large(found, room):
            for problem in problems:
                say(f"may not fit: {problem}")
            return recipe
        raise Refused(
            "this run will not fit; nothing was loaded:\n"
            + "\n".join(f"  {problem}" for problem in problems)
            + "\n`veneer plan` shows the parts, and recipes that fit; --force trains all the same."
        )

    return check
