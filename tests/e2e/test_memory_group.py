"""In a memory cgroup a run with weights and state in memory is killed; the paged one ends with the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "paged.py"


def test_killed_in_memory_finished_paged_with_the_same_bytes() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick"], env=environment, capture_output=True, text=True, check=False
    )
    if "no memory cgroup can be made" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["killed"], found["finished"], found["equal"]) == ([True], [True], [True]), done.stdout
    print(f"slowdown {found['slowdown'][0]:.2f} within {found['limits_mib'][0]} MiB")
