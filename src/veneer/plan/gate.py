"""Before the weights are read: refuse a run that cannot fit, instead of being ended by the system in the middle."""

from collections.abc import Callable
from contextlib import suppress

from veneer.errors import ModelError, Refused, VeneerError
from veneer.plan.alternatives import nearest
from veneer.plan.memory import certainly_too_large, estimate, room_for, verdict
from veneer.plan.preflight import check_sound
from veneer.recipe.overrides import with_changes
from veneer.train.job import Job
from veneer.units import format_bytes


def fit(job: Job, *, fixed: bool = False, force: bool = False, say: Callable[[str], None]) -> Job:
    """Return the job if it fits; with `memory.auto`, under the recipe with the cheapest change that does.

    fixed    the run has begun with this recipe, which then stays
    force    say what does not fit, and go on
    Raises Refused for a run that will not fit, and what training would refuse after loading.
    """
    recipe = job.recipe
    with suppress(ModelError):  # not to be followed without weights: said below
        check_sound(recipe, job, job.steps)
    picking = recipe.memory.auto and not fixed
    try:
        found = estimate(recipe, job, job.steps)
    except VeneerError as error:
        if picking and not force:
            raise Refused(f"memory.auto has nothing to go by, set it to false or use --force: {error}") from error
        say(f"whether it fits is not known: {error}")
        return job
    room = room_for(recipe)
    problems = verdict(found, room)
    if not problems:
        return job
    if picking and (fits := nearest(recipe, job, room, found.parts["runtime"])):
        say("\n".join(["it would not fit:", *[f"  {problem}" for problem in problems]]))
        say(f"memory.auto picks {fits[0].flags} ({format_bytes(fits[0].found.peak_bytes)} at the peak)")
        return job.with_recipe(with_changes(recipe, fits[0].changes))
    if force or not certainly_too_large(found, room):
        for problem in problems:
            say(f"may not fit: {problem}")
        return job
    raise Refused(
        "this run will not fit; nothing was loaded:\n"
        + "\n".join(f"  {problem}" for problem in problems)
        + "\n`veneer plan` shows the parts, and recipes that fit; --force trains all the same."
    )
