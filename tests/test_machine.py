"""What is read from /proc and /sys (made here), which dtype times speak for, and that imports change nothing."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veneer import machine

X86_INFO = """processor\t: 0
model name\t: Some CPU 9000
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu sse4_2 avx avx2 fma avx512f avx512_bf16 amx_bf16

processor\t: 1
model name\t: Some CPU 9000
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu sse4_2 avx avx2 fma avx512f avx512_bf16 amx_bf16
"""
ARM_INFO = """processor\t: 0
Features\t: fp asimd asimddp bf16 i8mm sve
CPU part\t: 0xd40
"""
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def made_root(root: Path, **files: str) -> Path:
    """A root with these files; "__" in a name stands for "/"."""
    for name, text in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def put(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@LINUX
def test_x86_facts(tmp_path: Path) -> None:
    found = machine.describe(made_root(tmp_path, proc__cpuinfo=X86_INFO))
    assert found.cpu == "Some CPU 9000"
    assert found.isa == ["sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"]
    assert found.physical_cores == 1, "two threads of one core"
    assert (found.memory_total, found.memory_limit, found.cpu_quota) == (None, None, None)
    assert "amx_bf16" in found.summary() and "memory unknown" in found.summary()


@LINUX
def test_arm_facts(tmp_path: Path) -> None:
    found = machine.describe(made_root(tmp_path, proc__cpuinfo=ARM_INFO))
    assert found.isa == ["asimd", "asimddp", "i8mm", "bf16", "sve"]
    assert found.cpu.endswith("part 0xd40")
    assert found.physical_cores is None


MEMINFO = "MemTotal:       8000000 kB\nMemAvailable:   6000000 kB\nSwapTotal:      1000 kB\n"


@LINUX
def test_memory_without_a_cgroup(tmp_path: Path) -> None:
    found = machine.describe(made_root(tmp_path, proc__meminfo=MEMINFO))
    assert (found.memory_total, found.memory_available) == (8_000_000 * 1024, 6_000_000 * 1024)
    assert found.swap_total == 1000 * 1024


@LINUX
def test_cgroup_v2_limits_of_any_level_count(tmp_path: Path) -> None:
    made_root(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/jobs/one\n")
    put(tmp_path, "sys/fs/cgroup/jobs/one/memory.max", "max\n")
    put(tmp_path, "sys/fs/cgroup/jobs/one/cpu.max", "max 100000\n")
    put(tmp_path, "sys/fs/cgroup/jobs/memory.max", "2000000000\n")
    put(tmp_path, "sys/fs/cgroup/jobs/memory.current", "500000000\n")
    put(tmp_path, "sys/fs/cgroup/jobs/memory.stat", "anon 1\ninactive_file 200000000\n")
    put(tmp_path, "sys/fs/cgroup/jobs/cpu.max", "50000 100000\n")
    found = machine.describe(tmp_path)
    assert found.memory_limit == found.memory_total == 2_000_000_000
    assert found.memory_available == 1_700_000_000, "dropped file cache is available"
    assert found.cpu_quota == 0.5
    assert found.usable_cores == 1


@LINUX
def test_the_fullest_level_says_what_is_available(tmp_path: Path) -> None:
    """A child with a tight limit and room may stand in a parent with a wide one and none."""
    made_root(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/jobs/one\n")
    put(tmp_path, "sys/fs/cgroup/jobs/one/memory.max", "1000000000\n")
    put(tmp_path, "sys/fs/cgroup/jobs/one/memory.current", "100000000\n")
    put(tmp_path, "sys/fs/cgroup/jobs/memory.max", "3000000000\n")
    put(tmp_path, "sys/fs/cgroup/jobs/memory.current", "2800000000\n")
    assert machine.available_bytes(tmp_path) == 200_000_000
    assert machine.describe(tmp_path).memory_limit == 1_000_000_000
    put(tmp_path, "sys/fs/cgroup/jobs/memory.current", "3100000000\n")
    assert machine.available_bytes(tmp_path) == 0


def test_available_memory_where_nothing_is_told(tmp_path: Path) -> None:
    assert machine.available_bytes(tmp_path) is None
    here = machine.available_bytes()
    assert here is None or 0 < here < 2**50


def test_cgroup_v1_and_a_path_that_is_not_visible(tmp_path: Path) -> None:
    lines = "9:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n"
    made_root(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup=lines)
    put(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "1000000000\n")
    put(tmp_path, "sys/fs/cgroup/memory/memory.usage_in_bytes", "300000000\n")
    put(tmp_path, "sys/fs/cgroup/memory/memory.stat", "total_inactive_file 100000000\n")
    put(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "150000\n")
    put(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    found = machine.describe(tmp_path)
    assert (found.memory_limit, found.memory_available) == (1_000_000_000, 800_000_000)
    assert found.cpu_quota == 1.5
    put(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    put(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    found = machine.describe(tmp_path)
    assert (found.memory_limit, found.cpu_quota) == (None, None)


def test_this_machine_is_described() -> None:
    found = machine.describe()
    assert 1 <= found.usable_cores <= found.logical_cores
    assert found.disk_free > 0 and Path(found.disk_path).exists()
    assert found.torch == torch.__version__
    assert found.memory_total is None or found.memory_total > 2**28


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert machine.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("VENEER_CACHE")
    assert machine.cache_dir() == tmp_path / "xdg/veneer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.cache_dir() == tmp_path / ".cache/veneer"


@LINUX
def test_memory_of_this_process_is_counted() -> None:
    code = (
        "from veneer import machine as m\n"
        "block = bytearray(200_000_000); block[::4096] = b'x' * len(block[::4096]); held = m.rss_bytes(); del block\n"
        "after, peak = m.rss_bytes(), m.peak_rss_bytes()\n"
        "print(held, after, peak, m.reset_peak_rss(), m.peak_rss_bytes())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    held, after, peak, could, fresh = int(run[0]), int(run[1]), int(run[2]), run[3], int(run[4])
    assert held > 200_000_000 > after
    assert peak >= held - 2**20, "the kernel counts pages in batches"
    assert could == "True" and fresh < 200_000_000


@pytest.mark.parametrize(
    ("times", "chosen", "reason"),
    [
        (
            (4e-3, 4e-3, 1e-3, 1e-3),
            "bfloat16",
            "bfloat16 is 4.0 times as fast as float32 here (2.00 ms against 8.00 ms",
        ),
        (
            (1e-3, 1e-3, 0.2e-3, 20e-3),
            "float32",
            "bfloat16 is 10.1 times slower than float32 here (20.20 ms against 2.00",
        ),
        ((1.1e-3, 1e-3, 1e-3, 1e-3), "float32", "bfloat16 is hardly faster than float32 here"),
    ],
)
def test_forward_and_backward_together_decide(times: tuple[float, ...], chosen: str, reason: str) -> None:
    probe = machine.choose(*times)
    assert probe.chosen == chosen
    assert probe.reason.startswith(reason)
    assert probe.ratio == pytest.approx(sum(times[:2]) / sum(times[2:]))


def test_a_probe_is_kept_and_made_anew_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    measured = []

    def timed(seconds: float) -> tuple[float, float, float, float]:
        measured.append(seconds)
        return (1.0, 1.0, 0.5, 0.25 / len(measured))

    monkeypatch.setattr(machine, "_timed_matmuls", timed)
    first = machine.probe_dtype()
    assert machine.probe_dtype() == first and len(measured) == 1
    assert machine.compute_dtype() == "bfloat16"
    assert machine.probe_dtype(refresh=True) != first and len(measured) == 2
    (kept,) = tmp_path.glob("probe-*.json")
    assert json.loads(kept.read_text())["bfloat16_backward"] == 0.125
    kept.write_text('{"other": 1}')
    machine.probe_dtype()
    assert len(measured) == 3, "a record of another version is measured over"
    monkeypatch.setenv("VENEER_CACHE", str(kept / "under-a-file"))
    machine.probe_dtype()
    assert len(measured) == 4, "a cache that cannot be written stops nobody"


def test_the_measurement_gives_times_and_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    times = machine._timed_matmuls(0.02)
    assert len(times) == 4 and all(0 < t < 60 for t in times)
    assert torch.equal(torch.get_rng_state(), before)


def prepared(**environment: str) -> dict[str, str]:
    code = (
        "import json, os; before = dict(os.environ); from veneer import machine; assert dict(os.environ) == before\n"
        "machine.prepare_process(); print(json.dumps({k: v for k, v in os.environ.items() if before.get(k) != v}))"
    )
    clean = {k: v for k, v in os.environ.items() if not re.match("G?OMP_|ONEDNN_|DNNL_|CUBLAS_", k)}
    run = subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, check=True)
    return dict(json.loads(run.stdout))


def test_our_own_process_spins_for_a_bounded_time_unless_told_otherwise() -> None:
    spin, kept = {"GOMP_SPINCOUNT": str(machine.SPIN_COUNT)}, {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
    order = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert prepared() == spin | kept | order
    assert prepared(OMP_WAIT_POLICY="active") == prepared(GOMP_SPINCOUNT="7") == kept | order
    assert prepared(ONEDNN_PRIMITIVE_CACHE_CAPACITY="9") == prepared(DNNL_PRIMITIVE_CACHE_CAPACITY="9") == spin | order
    assert prepared(CUBLAS_WORKSPACE_CONFIG=":16:8") == spin | kept


def test_shapes_of_earlier_steps_are_not_kept() -> None:
    """oneDNN, asked for 100 shapes twice in turn, prepares each of them twice."""
    code = (
        "from veneer import machine; machine.prepare_process(); import torch\n"
        "w = torch.ones(64, 64).bfloat16()\n"
        "for rows in [*range(200, 300)] * 2: torch.ones(rows, 64).bfloat16() @ w"
    )
    clean = {k: v for k, v in os.environ.items() if not re.match("ONEDNN_|DNNL_", k)} | {
        "ONEDNN_VERBOSE": "profile_create"
    }
    run = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    prepared, found = (run.stdout.count(f"create:cache_{end}") for end in ("miss", "hit"))
    if not prepared + found:
        pytest.skip("torch does not ask oneDNN here")
    assert (prepared, found) == (200, 0)


def test_a_cpu_quota_bounds_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_affinity", lambda: 64)
    monkeypatch.setattr(machine, "_cgroup_cpu", lambda root: 3.5)
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    machine.prepare_process()
    assert os.environ["OMP_NUM_THREADS"] == "4"
    os.environ["OMP_NUM_THREADS"] = "9"
    machine.prepare_process()
    assert os.environ["OMP_NUM_THREADS"] == "9"


def test_freed_memory_goes_back() -> None:
    """glibc keeps small freed pieces, here behind one that is still in use; elsewhere nothing happens."""
    code = (
        "from veneer import machine\n"
        "pieces = [bytearray(100_000) for _ in range(1000)]\n"
        "last = bytearray(100_000)\n"
        "del pieces\n"
        "before = machine.rss_bytes()\n"
        "machine.trim_memory()\n"
        "print(before - machine.rss_bytes())\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(said) >= (50 << 20 if platform.libc_ver()[0] == "glibc" else -(1 << 20))
