"""`veneer doctor` prints what it found and why it chose, and the same as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from veneer import machine
from veneer.cli import doctor
from veneer.cli.main import invoke
from veneer.kernels import native


def test_the_command_runs_as_a_user_runs_it(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in machine.OPENMP} | {"VENEER_CACHE": str(tmp_path)}
    environment["VENEER_NATIVE"] = "0"
    command = [sys.executable, "-m", "veneer", "doctor", "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *lines, last = run.stdout.splitlines()
    found = json.loads(last)
    labels = " ".join(line.split()[0] for line in lines)
    assert labels == "system cpu instructions cores memory swap disk compiler kernels cuda openmp dtype"
    assert found["compute_dtype"] in ("bfloat16", "float32")
    assert lines[-1] == f"dtype        {found['compute_dtype']}: {found['probe']['reason']}"
    assert found["probe"]["ratio"] > 0
    assert found["openmp"] == {"GOMP_SPINCOUNT": str(machine.SPIN_COUNT)}
    assert found["disk_path"] == str(tmp_path)
    assert found["kernels"] == {"instructions": None, "reason": "turned off by VENEER_NATIVE=0"}
    assert "kernels      none, plain torch computes instead, slower: turned off by VENEER_NATIVE=0" in lines
    assert len(list(tmp_path.glob("probe-*.json"))) == 1
    assert run.stderr == ""


def test_it_measures_anew_and_shows_limits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = machine.Machine(
        system="Linux x86_64", cpu="[red]CPU", isa=[], logical_cores=8, physical_cores=None, usable_cores=2,
        cpu_quota=1.5, memory_total=2**30, memory_available=2**29, memory_limit=2**30, swap_total=None, disk_free=2**40,
        disk_path="/x", compiler=None, python="3.11", torch=None, cuda=[], openmp={},
    )  # fmt: skip
    asked = []

    def probe(*, refresh: bool = False) -> machine.Probe:
        asked.append(refresh)
        return machine.choose(1, 1, 2, 2)

    monkeypatch.setattr(machine, "describe", lambda: found)
    monkeypatch.setattr(machine, "probe_dtype", probe)
    monkeypatch.setattr(native, "status", lambda: native.Status(True, Path("/x"), "avx2", "built now"))
    doctor.command()
    out = capsys.readouterr().out
    assert asked == [True]
    assert "[red]CPU" in out, "no markup is read into what the machine says"
    assert "2 usable of 8, unknown physical, a cgroup allows 1.5" in out
    assert "512 MiB available of 1 GiB (limited by a cgroup to 1 GiB)" in out
    assert "no C++ compiler found" in out
    assert "kernels      avx2: built now" in out
    assert "float32: bfloat16 is 2.0 times slower" in out
    assert "{" not in out


def test_help_has_an_example_and_wrong_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["doctor", "--help"]) == 0
    assert "Example: veneer doctor --json" in capsys.readouterr().out
    assert invoke(["doctor", "--nope"]) == 2
