"""Foresee the memory, disk and time a recipe takes, without reading weights."""

import time
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.console import AsJson, emit_json, remark, stderr, stdout
from veneer.errors import ConfigError, Refused
from veneer.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from veneer.plan.alternatives import Fit
    from veneer.plan.memory import Estimate, Room
    from veneer.plan.time import Times
    from veneer.recipe.settings import Recipe
    from veneer.train.job import BatchPlan, Job

ENOUGH = 10.0
"""Seconds after which no other recipe that would fit is timed."""
SETTINGS: dict[str, Any] = {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}}


def command(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    no_time: Annotated[bool, typer.Option("--no-time", help="Measure nothing; no seconds are foreseen.")] = False,
    as_json: AsJson = False,
) -> None:
    """Foresee what a recipe takes, and whether it fits; nothing is trained and no weights are read.

    If not, the nearest recipes that do are shown as flags to add, the cheapest change first, with what a step of them
    takes. Every key of the recipe is a flag, as for `veneer train`. Exit status 3 if it does not fit.

    Seconds are foreseen from two blocks of the model's shape, with made weights, that are run here; measured
    once, they are kept. Example:

        veneer plan recipe.yaml --train.max_length 2048 --memory.budget 6GiB
    """
    from veneer.kernels import native
    from veneer.plan.alternatives import nearest
    from veneer.plan.io_time import slow_disk
    from veneer.plan.memory import estimate, room_for, verdict
    from veneer.plan.meta_model import Plain
    from veneer.plan.preflight import check_sound
    from veneer.recipe.load import load_recipe, parse_flags
    from veneer.recipe.overrides import with_changes
    from veneer.train.compatibility import check_suited
    from veneer.train.job import read_job, steps_of, with_dtype

    if recipe.startswith("--"):
        raise ConfigError(f"the recipe comes first: veneer plan RECIPE {recipe} ...")
    settings = with_dtype(load_recipe(recipe, parse_flags(context.args)))
    check_suited(settings)
    rows = read_job(settings, remark)
    order = rows.steps
    check_sound(settings, rows, order)
    found, room = estimate(settings, rows, order), room_for(settings)
    problems = verdict(found, room)
    fits = nearest(settings, rows, room, found.parts["runtime"]) if problems else []
    picked = fits[0].changes if problems and fits and settings.memory.auto else {}
    if picked:
        settings, found, problems = with_changes(settings, picked), fits[0].found, []
        order = steps_of(settings, rows.examples)
    if (what := Plain.of(settings).by_kernels) is not None:
        native.say_without(what, remark)
    times = None if no_time or problems else _timed(settings, rows, order, found, room.memory)
    warnings = [] if times is None else slow_disk(settings, times.disk, times.waits, times.seconds_a_step)
    each = [] if no_time or not problems else _each_timed(settings, rows, fits, room.memory)
    if as_json:
        emit_json(
            {
                **_bytes(found, room),
                "fits": not problems,
                "picked": picked,
                "nearest": [
                    {"changes": f.changes, "peak_bytes": f.found.peak_bytes, "seconds_a_step": s}
                    for f, s in zip_longest(fits, each)
                ],
                **_seconds(times),
                "warnings": warnings,
                "steps": len(order),
                "trained_parameters": found.trained,
            }
        )
    else:
        lines = [f"memory at the peak ({found.moment}):", *_table(found.parts), "disk:", *_table(found.disk)]
        if found.droppable_bytes:
            lines += [f"what is paged fills {format_bytes(found.droppable_bytes)} more while there is room"]
        lines += [_left(room)]
        lines += [] if times is None else _spent(times)
        lines += [f"memory.auto picks {fits[0].flags}"] if picked else []
        lines += [f"warning: {warning}" for warning in warnings]
        lines += ["it fits"] if not problems else []
        stdout.print("\n".join(lines), markup=False, soft_wrap=True)
    if problems:
        others = [f"  {f.flags}   ({_costs(f, s)})" for f, s in zip_longest(fits, each)]
        ways = ["with these flags it would:", *others] if fits else ["no change of storage, portions or paging helps"]
        raise Refused("\n".join(["it does not fit:", *[f"  {p}" for p in problems], *ways]))


def _bytes(found: "Estimate", room: "Room") -> dict[str, Any]:
    """For --json."""
    return {
        "peak_bytes": found.peak_bytes,
        "floor_bytes": found.floor_bytes,
        "moment": found.moment,
        "parts": found.parts,
        "droppable_bytes": found.droppable_bytes,
        "disk_bytes": found.disk_bytes,
        "disk": found.disk,
        "memory_bytes": room.memory,
    }


def _left(room: "Room") -> str:
    memory = "unknown" if room.memory is None else format_bytes(room.memory)
    cache = "" if room.cache is None else f", {format_bytes(room.cache)} where the cache is"
    return f"{room.source} leaves {memory} of memory; {format_bytes(room.disk)} of disk are free{cache}"


def _each_timed(settings: "Recipe", rows: "Job", fits: "list[Fit]", room: int | None) -> list[float | None]:
    """Seconds a step of each recipe that would fit; None for those whose turn comes after `ENOUGH` seconds."""
    from veneer.recipe.overrides import with_changes
    from veneer.train.job import steps_of

    began, found = time.perf_counter(), []
    for fit in fits:
        seconds = None
        if time.perf_counter() - began < ENOUGH:
            other = with_changes(settings, fit.changes)
            seconds = _timed(other, rows, steps_of(other, rows.examples), fit.found, room).seconds_a_step
        found.append(seconds)
    return found


def _costs(fit: "Fit", seconds: float | None) -> str:
    peak = f"{format_bytes(fit.found.peak_bytes)} at the peak"
    return peak if seconds is None else f"{peak}, {format_seconds(seconds)} a step"


def _timed(settings: "Recipe", rows: "Job", order: "BatchPlan", found: "Estimate", room: int | None) -> "Times":
    """The seconds, with progress if they take some to measure."""
    from veneer.data.progress import showing
    from veneer.plan.batch_time import most_runs
    from veneer.plan.time import times

    with showing("timing blocks: runs", most_runs(settings), stderr) as advance:
        return times(settings, rows, order, found, advance, room)


def _seconds(times: "Times | None") -> dict[str, Any]:
    """For --json; null where nothing was measured."""
    if times is None:
        return {"seconds_a_step": None, "seconds_total": None, "seconds": None}
    return {
        "seconds_a_step": times.seconds_a_step,
        "seconds_total": times.total,
        "seconds": times.parts,
        "read_bytes_a_second": times.disk.read,
        "write_bytes_a_second": times.disk.write,
        "seconds_waiting_a_step": times.waiting,
        "seconds_waiting": times.waits,
    }


def _spent(times: "Times") -> list[str]:
    """Lines for people; what takes less than a hundredth of the total is left out."""
    own = {
        "training": f"{len(times.steps)} steps of {format_seconds(times.seconds_a_step)}",
        "quantizing": "quantizing, once",
    }
    shown = {own.get(n, n): s for n, s in times.parts.items() if n == "training" or s > times.total / 100}
    lines = ["time, from blocks that were timed here:"]
    lines += [f"  {name:<28}{format_seconds(s):>16}" for name, s in [*shown.items(), ("together", times.total)]]
    rates = {"reads": times.disk.read, "writes": times.disk.write}
    moved = [f"{verb} {format_bytes(rate)}" for verb, rate in rates.items() if rate is not None]
    if moved:
        waits = ", ".join(f"{format_seconds(s)} for {what}" for what, s in times.waits.items()) or "for nothing"
        lines += [f"  the disk {' and '.join(moved)} a second; a step waits {waits}"]
    return lines


def _table(parts: dict[str, int]) -> list[str]:
    rows = [*parts.items(), ("together", sum(parts.values()))]
    return [f"  {name:<28}{format_bytes(n):>10}" for name, n in rows]
