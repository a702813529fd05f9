"""Estimate the memory, disk and time a recipe needs, without reading weights."""

import time
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.console import AsJson, emit_json, remark, say, stderr
from veneer.errors import ConfigError, Refused
from veneer.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from veneer.plan.alternatives import Fit
    from veneer.plan.memory import Estimate
    from veneer.plan.room import Room
    from veneer.plan.time import Times
    from veneer.train.preflight import Checked

ENOUGH = 10.0
"""Seconds after which no other recipe that would fit is timed."""
SETTINGS: dict[str, Any] = {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}}


def command(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    no_time: Annotated[bool, typer.Option("--no-time", help="Measure nothing and estimate no seconds.")] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate the memory, disk and time a recipe needs, and whether it fits. Nothing is trained; no weights are read.

    If it does not fit, the nearest recipes that do are shown as flags to add, the cheapest change first, with their
    seconds a step. Every key of the recipe is a flag, as for `veneer train`. Exit status 3 if it does not fit.

    Seconds are timed here on two blocks of the model's shape with synthetic weights, and cached. Example:

        veneer plan recipe.yaml --train.max_length 2048 --memory.budget 6GiB
    """
    from veneer.kernels import native
    from veneer.plan.disk import slow_disk
    from veneer.plan.fit import Fitting
    from veneer.recipe.load import load_recipe, parse_flags
    from veneer.train.job import read_job, with_dtype
    from veneer.train.preflight import preflight

    if recipe.startswith("--"):
        raise ConfigError(f"the recipe comes first: veneer plan RECIPE {recipe} ...")
    settings = with_dtype(load_recipe(recipe, parse_flags(context.args)))
    fitting = Fitting.of(preflight(read_job(settings, remark)))
    checked, found, room, problems = fitting.checked, fitting.found, fitting.room, fitting.problems
    fits = fitting.nearest() if problems else []
    picked = fits[0].changes if fits and settings.memory.auto else {}
    if picked:
        checked, found, problems = fits[0].checked, fits[0].found, []
    if checked.by_kernels is not None:
        native.say_without(checked.by_kernels, remark)
    times = None if no_time or problems else _timed(checked, found, room)
    warnings = [] if times is None else slow_disk(checked.recipe, times.disk, times.waits, times.seconds_a_step)
    each = [] if no_time or not problems else _each_timed(fits, room)
    if as_json:
        nearest = [
            {"changes": f.changes, "peak_bytes": f.found.peak_bytes, "seconds_a_step": s}
            for f, s in zip_longest(fits, each)
        ]
        answer = {"fits": not problems, "picked": picked, "nearest": nearest, **_seconds(times), "warnings": warnings}
        counts = {"steps": len(checked.job.steps), "trained_parameters": found.trained}
        emit_json(_bytes(found, room) | answer | counts)
    else:
        lines = [*_needed(found, room), *([] if times is None else _spent(times))]
        lines += [f"memory.auto picks {fits[0].flags}"] if picked else []
        lines += [f"warning: {warning}" for warning in warnings] + ([] if problems else ["it fits"])
        say("\n".join(lines))
    if problems:
        others = [f"  {f.flags}   ({_costs(f, s)})" for f, s in zip_longest(fits, each)]
        ways = ["with these flags it would:", *others] if fits else ["no change of storage, portions or paging helps"]
        raise Refused("\n".join(["it does not fit:", *[f"  {p}" for p in problems], *ways]))


def _bytes(found: "Estimate", room: "Room") -> dict[str, Any]:
    """For --json."""
    names = ("peak_bytes", "floor_bytes", "moment", "parts", "droppable_bytes", "disk_bytes", "disk")
    return {name: getattr(found, name) for name in names} | {"memory_bytes": room.memory}


def _needed(found: "Estimate", room: "Room") -> list[str]:
    """Lines for people: bytes by part, and what there is."""
    memory = "unknown" if room.memory is None else format_bytes(room.memory)
    cache = "" if room.cache is None else f", {format_bytes(room.cache)} where the cache is"
    paged = f"what is paged fills {format_bytes(found.droppable_bytes)} more while there is room"
    return [
        f"memory at the peak ({found.moment}):",
        *_table(found.parts),
        "disk:",
        *_table(found.disk),
        *([paged] if found.droppable_bytes else []),
        f"{room.source} leaves {memory} of memory; {format_bytes(room.disk)} of disk are free{cache}",
    ]


def _each_timed(fits: "list[Fit]", room: "Room") -> list[float | None]:
    """Seconds a step of each recipe that would fit; None for those whose turn comes after `ENOUGH` seconds."""
    began = time.perf_counter()
    return [
        _timed(fit.checked, fit.found, room).seconds_a_step if time.perf_counter() - began < ENOUGH else None
        for fit in fits
    ]


def _costs(fit: "Fit", seconds: float | None) -> str:
    peak = f"{format_bytes(fit.found.peak_bytes)} at the peak"
    return peak if seconds is None else f"{peak}, {format_seconds(seconds)} a step"


def _timed(checked: "Checked", found: "Estimate", room: "Room") -> "Times":
    """The seconds, with progress if they take some to measure."""
    from veneer.data.progress import showing
    from veneer.plan.time import most_runs, times

    with showing("timing blocks: runs", most_runs(checked.recipe), stderr) as advance:
        return times(checked, found, advance, room.memory)


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
