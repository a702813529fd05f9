"""The plan's peak is near the measured one, for two small recipes of the real model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan_accuracy.py"


@pytest.mark.model
def test_small_recipes_peak_where_they_were_foreseen(smollm2: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--small"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["recipes"]) == {"small", "small-recompute"}
    assert found["worst_error"] <= 0.12, done.stdout
