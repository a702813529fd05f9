"""Load the C library of the CPU kernels, building it if needed, or report why it is unavailable.

Search order: a library in the wheel (`veneer/kernels/libveneer.so`), one built earlier on this machine (in the cache
folder, keyed by sources and compiler), else build it with a C++ compiler (seconds).
`VENEER_NATIVE=0` turns it off; `VENEER_ISA=scalar|avx2|avx512|avx512bf16|neon` forces an instruction set.

The library starts no threads: it runs in torch's own OpenMP pool, whose entry point it receives here.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch  # loaded before the library, so that torch's pool exists

from veneer.errors import ConfigError
from veneer.machine import cache_dir, find_compiler

ISAS = ("scalar", "avx2", "avx512", "avx512bf16", "neon")
"""In the order of their numbers in csrc/veneer.h; the last one that the machine has is chosen."""
ABI = 2
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Status:
    """Whether the C library is in use, and where it comes from or why it is unavailable."""

    available: bool
    path: Path | None
    isa: str | None
    reason: str


class Map8(ctypes.Structure):
    """`veneer_map8` of csrc/veneer.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("levels", "bounds", "lines"))


class Weight(ctypes.Structure):
    """`veneer_weight` of csrc/veneer.h: pointers, then sizes."""

    TENSORS = ("codes", "absmax", "absmax_codes", "nested_absmax", "nested_levels", "levels")
    _fields_ = (
        *((name, ctypes.c_void_p) for name in TENSORS),
        ("nested_offset", ctypes.c_float),
        ("nested_block", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("rows", "cols", "block")),
    )


@dataclass(frozen=True)
class Native:
    """The loaded library and the instruction set chosen for it."""

    lib: ctypes.CDLL
    isa: int
    status: Status


def status() -> Status:
    """The status of the C library, for `veneer doctor`.  Raises ConfigError for an invalid VENEER_ISA."""
    found = load()
    return found.status if isinstance(found, Native) else found


def say_without(what: str, say: Callable[[str], None]) -> None:
    """If the C library is unavailable, say in one line that torch computes `what`, why, and what to do."""
    found = status()
    if not found.available:
        say(f"plain torch computes {what}, slower: {found.reason.splitlines()[0]}")


def library() -> Native | None:
    """The C library, or None if torch computes everything."""
    found = load()
    return found if isinstance(found, Native) else None


@cache
def load() -> Native | Status:
    """Find or build the library, check it, and choose an instruction set; once per process."""
    forced = forced_isa()
    if os.environ.get("VENEER_NATIVE") == "0":
        return Status(False, None, None, "turned off by VENEER_NATIVE=0")
    path, how = locate()
    if path is None:
        return Status(False, None, None, how)
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        return Status(False, path, None, f"{path} could not be loaded ({error}); remove it to build it again")
    found = getattr(lib, "veneer_abi", lambda: None)()
    if found != ABI:
        return Status(False, path, None, f"{path} has ABI {found}, this veneer needs {ABI}; remove it")
    declare(lib)
    isa = choose_isa(lib, forced)
    threads = join_pool(lib)
    return Native(lib, isa, Status(True, path, ISAS[isa], f"{how}; {threads}"))


def forced_isa() -> str | None:
    """The instruction set that VENEER_ISA names.  Raises ConfigError for an unknown name."""
    name = os.environ.get("VENEER_ISA")
    if name is not None and name not in ISAS:
        raise ConfigError(f"VENEER_ISA={name} is not an instruction set; it can be one of {', '.join(ISAS)}")
    return name


def choose_isa(lib: ctypes.CDLL, forced: str | None) -> int:
    """The number of the forced instruction set, or of the best one of this machine."""
    has = [i for i in range(len(ISAS)) if lib.veneer_has(i)]
    if forced is None:
        return has[-1]
    if ISAS.index(forced) not in has:
        raise ConfigError(
            f"VENEER_ISA={forced}: this machine has no {forced}; it has {', '.join(ISAS[i] for i in has)}"
        )
    return ISAS.index(forced)


def declare(lib: ctypes.CDLL) -> None:
    """Declare the argument types of every function; without them ctypes cuts pointers to 32 bits."""
    i32, i64, p = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    weight = ctypes.POINTER(Weight)
    signatures = {
        "veneer_has": [i32],
        "veneer_use_pool": [p],
        "veneer_quantize": [i32, i32, p, i32, i64, i64, p, p, p, p, ctypes.POINTER(i64)],
        "veneer_encode_absmax": [i32, i32, p, i64, i64, ctypes.POINTER(Map8), p, p],
        "veneer_decode_absmax": [i32, i32, weight, p],
        "veneer_dequantize": [i32, i32, weight, p, i32],
        "veneer_matmul": [i32, i32, weight, p, i32, i64, p],
        "veneer_matmul_backward": [i32, i32, weight, p, i32, i64, p],
        "veneer_lora_segments": [i32, i32, p, i32, i64, i64, i64, i64, p, p, p, p, p, i64, p],
        "veneer_adamw8_step": [i32, i32, p, i64, p, p, p, p, p, p],
    }
    for name, arguments in signatures.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, None if name == "veneer_use_pool" else i32


def join_pool(lib: ctypes.CDLL) -> str:
    """Pass torch's OpenMP entry point to the library, so that both share one thread pool."""
    path = loaded_gomp()
    if path is None:
        return "one thread (torch does not use libgomp here)"
    entry = ctypes.CDLL(path).GOMP_parallel  # already loaded: this is torch's own copy, not a second one
    lib.veneer_use_pool(ctypes.cast(entry, ctypes.c_void_p))
    return "threads of torch's OpenMP pool"


def loaded_gomp() -> str | None:
    """The libgomp mapped into this process; torch's own if there are several."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if "libgomp" in line}
    beside_torch = str(Path(torch.__file__).parent)
    return min(paths, key=lambda path: (not path.startswith(beside_torch), path), default=None)


def locate() -> tuple[Path | None, str]:
    """The library's path and origin, or None and the reason."""
    prebuilt = HERE / "libveneer.so"
    if prebuilt.is_file():
        return prebuilt, "built into the package"
    sources = source_dir()
    if sources is None:
        return None, f"no built library at {prebuilt} and no sources beside it; reinstall veneer"
    compiler = find_compiler()
    if compiler is None:
        return (
            None,
            "no C++ compiler found (looked for $CXX, g++, clang++, c++); install one, or a wheel with the library",
        )
    try:
        key = key_of(sources, compiler)
    except OSError as error:
        return None, f"the C++ compiler {compiler} does not run ({error.strerror}); install one, or set CXX to another"
    built = cache_dir() / "kernels" / f"libveneer-{key}.so"
    if built.is_file():
        return built, "built earlier on this machine"
    problem = build(sources, compiler, built)
    return (None, problem) if problem else (built, "built now")


def source_dir() -> Path | None:
    """csrc/ of the installed package, or of this checkout."""
    for folder in (HERE / "csrc", HERE.parents[2] / "csrc"):
        if (folder / "veneer.cpp").is_file():
            return folder
    return None


def key_of(sources: Path, compiler: str) -> str:
    """Hash (16 hexadecimal digits) of the sources, the flags and the compiler's version."""
    digest = hashlib.sha256(subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout)
    for file in sorted([*sources.glob("*.h"), *sources.glob("*.cpp"), sources / "FLAGS"]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def build(sources: Path, compiler: str, to: Path) -> str | None:
    """Compile the library and move it to `to`; returns None, or the reason it failed."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent) as folder:
            made = Path(folder) / to.name
            flags = (sources / "FLAGS").read_text(encoding="utf-8").split()
            command = [compiler, *flags, str(sources / "veneer.cpp"), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                detail = f"{' '.join(command)}: {done.stderr.strip()[-500:]}"
                return f"the kernels could not be built; set CXX to another C++ compiler: {detail}"
            made.replace(to)
    except OSError as error:
        return f"the kernels could not be built: {error}; set VENEER_CACHE to a writable folder"
    return None
