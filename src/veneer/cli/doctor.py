"""Look at this machine: cores, memory, compiler, kernels, and which dtype it computes faster in."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from veneer import machine
from veneer.cli.console import AsJson, emit_json, say
from veneer.units import format_bytes

if TYPE_CHECKING:
    from veneer.kernels.native import Status


def command(as_json: AsJson = False) -> None:
    """Say what veneer finds on this machine, what it chooses, and why.

    bfloat16 and float32 are measured anew each time, in about half a second, and the result is kept for later runs.

    Example: veneer doctor --json
    """
    from veneer.kernels import native

    found, kernels = machine.describe(), native.status()
    probe = machine.probe_dtype(refresh=True)
    for label, value in _rows(found, kernels, probe):
        say(f"{label:<12} {value}")
    if as_json:
        built = {"kernels": {"instructions": kernels.isa, "reason": kernels.reason}}
        chosen = {"compute_dtype": probe.chosen, "probe": asdict(probe) | {"ratio": probe.ratio}}
        emit_json(asdict(found) | built | chosen)


def _rows(found: machine.Machine, kernels: "Status", probe: machine.Probe) -> list[tuple[str, str]]:
    quota = f", a cgroup allows {found.cpu_quota:g}" if found.cpu_quota is not None else ""
    limit = f" (limited by a cgroup to {format_bytes(found.memory_limit)})" if found.memory_limit is not None else ""
    physical = "unknown" if found.physical_cores is None else found.physical_cores
    set_up = " ".join(f"{name}={value}" for name, value in found.openmp.items())
    return [
        ("system", f"{found.system}, Python {found.python}, torch {found.torch or 'not installed'}"),
        ("cpu", found.cpu),
        ("instructions", " ".join(found.isa) or "none that matter here"),
        ("cores", f"{found.usable_cores} usable of {found.logical_cores}, {physical} physical{quota}"),
        ("memory", f"{_size(found.memory_available)} available of {_size(found.memory_total)}{limit}"),
        ("swap", _size(found.swap_total)),
        ("disk", f"{format_bytes(found.disk_free)} free at {found.disk_path}"),
        ("compiler", found.compiler or "no C++ compiler found"),
        ("kernels", f"{kernels.isa or 'none, plain torch computes instead, slower'}: {kernels.reason}"),
        ("cuda", ", ".join(found.cuda) or "no device"),
        ("openmp", set_up or "nothing set"),
        ("dtype", f"{probe.chosen}: {probe.reason}"),
    ]


def _size(value: int | None) -> str:
    return "unknown" if value is None else format_bytes(value)
