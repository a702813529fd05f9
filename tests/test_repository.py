"""The files around the code: versions, targets, and what CI runs."""

import os
import re
import subprocess
import tomllib
from pathlib import Path
from shutil import which

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {
    str(canonicalize_name(r.name)): next(iter(r.specifier)).version
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for r in [Requirement(line)]
}
INSTALLED_BY_SETUP = ("data", "docs", "lion", "metrics", "test", "dev")
ASKED = [
    requirement
    for requirement in map(
        Requirement,
        [*PROJECT["dependencies"], *(r for e in INSTALLED_BY_SETUP for r in PROJECT["optional-dependencies"][e])],
    )
    if requirement.name != "veneer"
]


@pytest.mark.parametrize("requirement", ASKED, ids=str)
def test_every_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    pin = PINS.get(canonicalize_name(requirement.name))
    assert pin is not None, f"constraints.txt has no {requirement.name}"
    assert requirement.specifier.contains(pin, prereleases=True), f"{requirement} is pinned to {pin}"


def test_pins_are_exact_sorted_and_of_every_platform() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert lines == sorted(lines) and len(lines) == len(PINS)
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][\w.]*", line) for line in lines), "no +cpu, no ranges"


def test_make_has_its_targets_and_each_sets_itself_up() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("setup", "demo", "test", "check", "bench", "docs", "demo-data"):
        assert re.search(rf"^{target}: \$\(STAMP\)$", makefile, re.M), f"{target} should depend on the stamp"


def test_ci_runs_what_a_contributor_runs() -> None:
    script = ROOT / ".ci" / "run"
    lines = script.read_text(encoding="utf-8").splitlines()
    assert os.access(script, os.X_OK) and "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make ")] == ["make setup", "make check", "make test"]
    assert "export CI=true" in lines, "pytest then names what it skipped for a missing package"


def test_ci_goes_on_where_nothing_can_be_installed(tmp_path: Path) -> None:
    """On a made checkout and PATH: no registry answers; `make` and the environment's Python do nothing."""
    (tmp_path / "checkout" / ".ci").mkdir(parents=True)
    script = tmp_path / "checkout" / ".ci" / "run"
    script.write_bytes((ROOT / ".ci" / "run").read_bytes())
    programs = {"bin/make": "0", "bin/apt-get": "100", "checkout/.venv/bin/python": "1"}
    for name, status in programs.items():
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "{program.name} $*"\nexit {status}\n')
        program.chmod(0o755)
    for tool in ("bash", "dirname", "id", "uname", "env"):
        (tmp_path / "bin" / tool).symlink_to(str(which(tool)))
    environment = {"PATH": str(tmp_path / "bin")}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = [line for line in done.stdout.splitlines() if line.startswith("make")]
    assert made == ["make setup", "make check", "make test"]
    assert ".ci/run: could not install g++" in done.stderr and "could not install xllamacpp" in done.stderr


def test_the_license_is_the_one_named() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").split()[:4] == ["Apache", "License", "Version", "2.0,"]


def test_the_quick_benchmarks_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    scripts = re.findall(r"\$\(BIN\)/python (benchmarks/\S+)", makefile)
    assert scripts and all((ROOT / script).is_file() for script in scripts)
