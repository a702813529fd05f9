"""On CI, tests that were skipped for a missing package are named at the end; elsewhere nothing is added."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest

@pytest.mark.skipif(True, reason="needs the cross compiler")
@pytest.mark.parametrize("n", [1, 2])
def test_compiled(n): pass

def test_imported(): pytest.importorskip("no_such_package")

@pytest.mark.skipif(True, reason="this machine has no neon")
def test_neon(): pass
"""


def report(folder: Path, ci: str) -> str:
    (folder / "test_made.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-c", "pytest.ini", "test_made.py"]
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ci_names_what_a_missing_package_left_out(tmp_path: Path) -> None:
    told = report(tmp_path, "true").partition("NOT TESTED: something is not installed")[2]
    lines = [line.strip() for line in told.splitlines()]
    assert "2 skipped: needs the cross compiler" in lines
    assert "test_made.py::test_compiled[1]" in lines and "test_made.py::test_compiled[2]" in lines
    assert any(line.startswith("1 skipped: could not import 'no_such_package'") for line in lines)
    assert "neon" not in told, "what the machine lacks cannot be installed"


@pytest.mark.parametrize("ci", ["", "false"])
def test_elsewhere_it_is_left_to_pytest(tmp_path: Path, ci: str) -> None:
    assert "NOT TESTED" not in report(tmp_path, ci)
