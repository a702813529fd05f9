"""The machine: cores, memory, instruction set, and whether bfloat16 or float32 is faster on it.

Importing it changes nothing. veneer's command calls `prepare_process`, which does, before torch starts.
"""

import ctypes
import hashlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from timeit import timeit
from typing import Any

SPIN_COUNT = 1000
"""Iterations that a waiting OpenMP thread spins before it sleeps.

Seconds per step of benchmarks/openmp_spin.py, two runs on two Zen 5 cores that other programs kept busy: libgomp's
default 3.0 and 2.7, this value 0.49 and 1.02, passive 0.48 and 0.58. Not yet measured on an idle machine.
"""
PRIMITIVES = 64
"""Capacity of oneDNN's primitive cache: compiled matrix products, one per shape.

Packed batches differ in their number of tokens, so each step has about 20 new shapes that hardly ever repeat. With the
default of 1024, 203 steps on 2400 rows of WikiSQL (NF4, one thread) peaked at 2.76 GB instead of 2.39.
"""
CLEARLY_FASTER = 1.2
"""bfloat16 is chosen if float32 takes at least this many times as long; otherwise float32 is more exact."""
FLAGS = """
sse4_2 avx avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16
amx_tile amx_int8 amx_bf16 asimd asimdhp asimddp i8mm bf16 sve sve2 sme
"""
"""x86 first, then ARM."""
MAC = {"AdvSIMD": "asimd", "FEAT_FP16": "asimdhp", "FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16"}
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY")
UNLIMITED = 1 << 60
"""Bytes; cgroup v1 writes "no limit" as a larger number."""


@dataclass(frozen=True)
class Machine:
    """Facts about the machine; None where the system does not report one."""

    system: str
    cpu: str
    isa: list[str]
    logical_cores: int
    physical_cores: int | None
    usable_cores: int
    """Cores this process may use, after CPU affinity and the cgroup's quota."""
    cpu_quota: float | None
    """The cgroup's CPU quota in cores; None without a limit."""
    memory_total: int | None
    """Bytes, like the next four; at most the cgroup's limit."""
    memory_available: int | None
    memory_limit: int | None
    """The cgroup's limit, if any."""
    swap_total: int | None
    disk_free: int
    disk_path: str
    """The cache folder, or its nearest existing parent."""
    compiler: str | None
    python: str
    torch: str | None
    cuda: list[str]
    openmp: dict[str, str]

    def summary(self) -> str:
        """One line for a benchmark's record."""
        fast = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16", "asimd") if flag in self.isa]
        memory = f"{self.memory_total / 2**30:.0f} GiB" if self.memory_total else "memory unknown"
        return f"{self.cpu}, {self.usable_cores} cores, {' '.join(fast[:1])}, {memory}, torch {self.torch}"


def cache_dir() -> Path:
    """The cache folder: $VENEER_CACHE, else $XDG_CACHE_HOME/veneer, else ~/.cache/veneer."""
    if own := os.environ.get("VENEER_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "veneer"


def prepare_process() -> None:
    """Configure OpenMP, oneDNN and cuBLAS before torch starts; environment variables that the user has set win.

    Threads spin for a bounded time: with no bound, two processes on the same cores slow each other many times over;
    with no spinning, every short parallel region waits for a thread to wake. Under a cgroup's CPU quota the number of
    threads is the quota; with more, the kernel would stop all of them for part of every period.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    if "OMP_NUM_THREADS" not in os.environ and usable_cores() < _affinity():
        os.environ["OMP_NUM_THREADS"] = str(usable_cores())
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits each time on CUDA
    if not any(f"{name}_PRIMITIVE_CACHE_CAPACITY" in os.environ for name in ("ONEDNN", "DNNL")):
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = str(PRIMITIVES)


def describe(root: Path = Path("/")) -> Machine:
    """Collect the facts; `root` is the folder that holds /proc and /sys."""
    total, _, swap = _memory(root)
    limit = min((most for most, _ in _cgroup_memory(root)), default=None)
    if limit is not None:
        total = min(total, limit) if total else limit
    place = next(folder for folder in [cache_dir(), *cache_dir().parents] if folder.exists())
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_model(root),
        isa=isa_flags(root),
        logical_cores=os.cpu_count() or 1,
        physical_cores=_physical_cores(root),
        usable_cores=usable_cores(root),
        cpu_quota=_cgroup_cpu(root),
        memory_total=total,
        memory_available=available_bytes(root),
        memory_limit=limit,
        swap_total=swap,
        disk_free=shutil.disk_usage(place).free,
        disk_path=str(place),
        compiler=_compiler(),
        python=platform.python_version(),
        torch=_torch_version(),
        cuda=_cuda_devices(),
        openmp={name: os.environ[name] for name in OPENMP if name in os.environ},
    )


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory available to this process now: the system's, or what its cgroup (v1 or v2) leaves, whichever is less.

    Page cache that can be dropped counts as free.  None where the system does not report it.
    """
    _, available, _ = _memory(root)
    rooms = [max(limit - used, 0) for limit, used in _cgroup_memory(root)]
    return min(rooms if available is None else [available, *rooms], default=None)


def isa_flags(root: Path = Path("/")) -> list[str]:
    """The instruction sets relevant to matrix kernels, by their names in /proc/cpuinfo."""
    if sys.platform == "darwin":
        found = {name for feature, name in MAC.items() if _sysctl(f"hw.optional.arm.{feature}") == "1"}
        found |= set((_sysctl("machdep.cpu.features") + " " + _sysctl("machdep.cpu.leaf7_features")).lower().split())
    else:
        lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
        found = set(lines[0].split()) if lines else set()
    return [flag for flag in FLAGS.split() if flag in found]


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may use: its CPU affinity, at most its cgroup's quota."""
    quota = _cgroup_cpu(root)
    return _affinity() if quota is None else max(1, min(_affinity(), math.ceil(quota)))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model(root: Path) -> str:
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    text = _text(root / "proc/cpuinfo")
    for key in ("model name", "Hardware", "cpu model", "CPU part"):
        if found := re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE):
            return found[1].strip() if key != "CPU part" else f"{platform.machine()} part {found[1].strip()}"
    return platform.processor() or platform.machine()


def _physical_cores(root: Path) -> int | None:
    if sys.platform == "darwin":
        return int(_sysctl("hw.physicalcpu") or 0) or None
    text = _text(root / "proc/cpuinfo")
    packages = re.findall(r"^physical id\s*:\s*(\d+)$", text, re.MULTILINE)
    cores = re.findall(r"^core id\s*:\s*(\d+)$", text, re.MULTILINE)
    return len(set(zip(packages, cores, strict=False))) or None


def _memory(root: Path) -> tuple[int | None, int | None, int | None]:
    """Total, available and swap, in bytes."""
    if sys.platform == "darwin":
        total = int(_sysctl("hw.memsize") or 0) or None
        pages = dict(re.findall(r"^Pages (free|inactive|speculative):\s+(\d+)\.", _run("vm_stat"), re.MULTILINE))
        size = os.sysconf("SC_PAGE_SIZE")
        return total, (sum(map(int, pages.values())) * size or None), None
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE))
    kib = {name: int(value) * 1024 for name, value in found.items()}
    return kib.get("MemTotal"), kib.get("MemAvailable"), kib.get("SwapTotal")


def cgroup_folders(root: Path, controller: str) -> list[Path]:
    """The cgroup folders of this process that may hold limits, innermost first; controller "" is cgroup v2.

    In a container the path in /proc/self/cgroup may not exist under /sys/fs/cgroup; then its existing parents are used.
    """
    mount = root / "sys/fs/cgroup" / controller
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(","):
            inner = mount / path.lstrip("/")
            return [folder for folder in (inner, *inner.parents) if folder.is_relative_to(mount) and folder.is_dir()]
    return []


def _cgroup_memory(root: Path) -> list[tuple[int, int]]:
    """Every memory limit on this process and its current use (without page cache that can be dropped), in bytes."""
    found = []
    names = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
    for controller, (limit_name, used_name) in names.items():
        for folder in cgroup_folders(root, controller):
            limit = _text(folder / limit_name).strip()
            if limit.isdigit() and int(limit) < UNLIMITED:
                used = int(_text(folder / used_name).strip() or 0)
                cache = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                found.append((int(limit), max(used - int(cache[1]) if cache else used, 0)))
    return found


def _cgroup_cpu(root: Path) -> float | None:
    """The smallest quota, in cores."""
    quotas = [_text(folder / "cpu.max").split() for folder in cgroup_folders(root, "")]
    for folder in cgroup_folders(root, "cpu"):
        quotas.append([_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")])
    cores = [int(q[0]) / int(q[1]) for q in quotas if len(q) == 2 and q[0].isdigit() and int(q[1] or 0) > 0]
    return min(cores, default=None)


def find_compiler() -> str | None:
    """The path of the first C++ compiler found: $CXX, g++, clang++, c++."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _compiler() -> str | None:
    """The C++ compiler as "path (version line)"."""
    path = find_compiler()
    return path and f"{path} ({(_run(path, '--version').splitlines() or ['version unknown'])[0]})"


def _torch_version() -> str | None:
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def _cuda_devices() -> list[str]:
    if _torch_version() is None:
        return []
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def rss_bytes() -> int:
    """Resident memory of this process now."""
    if found := re.search(r"^VmRSS:\s+(\d+) kB$", _text(Path("/proc/self/status")), re.MULTILINE):
        return int(found[1]) * 1024
    return int(_run("ps", "-o", "rss=", "-p", str(os.getpid())).strip() or 0) * 1024


def peak_rss_bytes() -> int:
    """Peak resident memory since the process started, or since `reset_peak_rss`."""
    if found := re.search(r"^VmHWM:\s+(\d+) kB$", _text(Path("/proc/self/status")), re.MULTILINE):
        return int(found[1]) * 1024
    import resource  # not on Windows, where /proc is missing too

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_rss() -> bool:
    """Reset the peak to the current value; returns whether the system allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def trim_memory() -> None:
    """Return freed heap memory to the system (malloc_trim).

    Saves 1.0 GB while a 1.1B model is quantized, and 200 MiB after the forward pass of 6 of its blocks.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass(frozen=True)
class Probe:
    """Seconds of one frozen linear layer (512 tokens, 1024 to 1024): forward, and the gradient of its input."""

    float32_forward: float
    float32_backward: float
    bfloat16_forward: float
    bfloat16_backward: float
    chosen: str
    """"bfloat16" or "float32"."""
    reason: str

    @property
    def ratio(self) -> float:
        """How many times as long float32 takes."""
        return (self.float32_forward + self.float32_backward) / (self.bfloat16_forward + self.bfloat16_backward)


def compute_dtype() -> str:
    """The default compute dtype on this machine."""
    return probe_dtype().chosen


def probe_dtype(*, refresh: bool = False, seconds: float = 0.5) -> Probe:
    """Time bfloat16 and float32, or return the cached result for this CPU, torch version and number of threads.

    refresh   measure even if a result is cached
    seconds   time limit of the measurement, after its warm-up
    """
    import torch

    facts = [_cpu_model(Path("/")), *isa_flags(), torch.__version__, str(torch.get_num_threads())]
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    cached = cache_dir() / f"probe-{key}.json"
    if not refresh:
        with suppress(OSError, ValueError, TypeError):  # missing, or written by another version
            return Probe(**json.loads(cached.read_text(encoding="utf-8")))
    probe = choose(*_timed_matmuls(seconds))
    with suppress(OSError):  # without a cache the next run measures again, half a second
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(probe)), encoding="utf-8")
        temporary.replace(cached)
    return probe


def choose(f32_forward: float, f32_backward: float, bf16_forward: float, bf16_backward: float) -> Probe:
    """Choose the dtype from these four times in seconds; also says why."""
    slow, fast = f32_forward + f32_backward, bf16_forward + bf16_backward
    chosen = "bfloat16" if slow >= CLEARLY_FASTER * fast else "float32"
    times = f"{fast * 1e3:.2f} ms against {slow * 1e3:.2f} ms, forward and backward"
    if chosen == "bfloat16":
        reason = f"bfloat16 is {slow / fast:.1f} times as fast as float32 here ({times})"
    elif slow >= fast:
        reason = f"bfloat16 is hardly faster than float32 here ({times}), and float32 is more exact"
    else:
        reason = f"bfloat16 is {fast / slow:.1f} times slower than float32 here ({times})"
    return Probe(f32_forward, f32_backward, bf16_forward, bf16_backward, chosen, reason)


def _timed_matmuls(seconds: float) -> tuple[float, float, float, float]:
    """Median seconds of float32 forward and backward, bfloat16 forward and backward, measured in turns."""
    import torch
    from torch.nn.functional import linear

    n, d, o = 512, 1024, 1024
    rng = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(shape, generator=rng) for shape in ((n, d), (o, d), (n, o)))
    turns: list[Callable[[], Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        turns += [partial(linear, x.to(dtype), w.to(dtype)), partial(torch.matmul, dy.to(dtype), w.to(dtype))]
    times: list[list[float]] = [[] for _ in turns]
    with torch.no_grad():
        warm = sum(timeit(turn, number=1) for turn in turns)
        end = time.perf_counter() + seconds
        while not times[0] or (time.perf_counter() < end and warm < seconds):
            for turn, taken in zip(turns, times, strict=True):
                taken.append(timeit(turn, number=1))
    first, second, third, fourth = (statistics.median(taken) for taken in times)
    return first, second, third, fourth


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    return _run("sysctl", "-n", name).strip()


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
