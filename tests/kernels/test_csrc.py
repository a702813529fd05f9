"""The C++ tests: every instruction set of this machine under sanitizers, and NEON under an emulator."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from veneer.kernels import native

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = [str(CSRC / "veneer.cpp"), str(CSRC / "tests" / "test_kernels.cpp")]
COMMON = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-pthread"]
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
"""GCC 12 warns about its own AVX-512 headers (its bug 105593)."""


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def test_no_byte_is_touched_that_is_not_ours(tmp_path: Path) -> None:
    compiler = native.find_compiler()
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    sanitize = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = str(tmp_path / "kernels")
    probe = subprocess.run(
        [compiler, *sanitize, "-x", "c++", "-", "-o", program], input="int main(){}", text=True, check=False
    )
    if probe.returncode:
        pytest.skip(f"needs the sanitizers of {compiler}")
    quiet = [] if "clang" in compiler else QUIET
    assert run([compiler, *sanitize, *COMMON, *quiet, *SOURCES, "-o", program]) == "", "a warning"
    assert run([program]).splitlines()[-1] == "ok"


def test_neon_under_an_emulator(tmp_path: Path) -> None:
    if platform.machine() == "aarch64":
        pytest.skip("this machine has NEON itself")
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)")
    program = str(tmp_path / "kernels")
    assert run([compiler, "-O2", "-static", *COMMON, *SOURCES, "-o", program]) == "", "a warning"
    lines = run([emulator, program]).splitlines()
    assert lines[0] == "neon"
    assert lines[-1] == "ok"
