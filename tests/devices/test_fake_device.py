"""Everything that runs on the CPU runs on a second device, with the same numbers and nothing left behind.

cases.py runs in one process of its own, since the fake device (fake_device.py) changes the process for good.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.devices.cases import CASES
from tests.train.conftest import write_rows

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="needs torch 2.13: devices written in Python are experimental"
)
REFUSED = {
    "page_weights": "ConfigError: memory.page_weights reads weights for a CPU, not for fake; set it to false",
    "paged_state": "ConfigError: optimizer.paged is true, but only the CPU's memory is paged",
}
CLOSE = {"bfloat16": 0.05, "restarts_random": 1e-4, "restarts": 1e-4, "restarts_nf4": 1e-4, "remora": 1e-4}
"""Relative differences between the devices; 1e-5 for all others."""


@pytest.fixture(scope="module")
def outcomes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("devices")
    (folder / "model").symlink_to(tiny_model)
    write_rows(folder / "rows.jsonl")
    paths = os.pathsep.join(map(str, (ROOT / "src", ROOT)))
    ran = subprocess.run(
        [sys.executable, HERE / "cases.py", folder],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "VENEER_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {line["case"]: line for line in map(json.loads, ran.stdout.splitlines())}


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_another_device_gives_the_same_numbers(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    found = outcomes[name]
    assert (found["cpu"], found["fake"]) == ("", "")
    assert found["difference"] <= CLOSE.get(name, 1e-5)


def test_a_resumed_run_has_the_same_bytes(outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes["resumed"]["same"] == 1


@pytest.mark.parametrize("name", REFUSED)
def test_what_pages_from_the_cpus_memory_is_refused(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes[name]["fake"].startswith(REFUSED[name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixing", "all tensors should be on the same device, but found fake:0 and cpu"),
        ("generator", "expected a generator of fake:0, but found one of cpu"),
        ("float64", "fake:0 has no float64"),
        ("address", "a kernel of the CPU asks for the address of a tensor on fake:0"),
    ],
)
def test_the_fake_device_refuses_what_a_real_one_does(
    name: str, message: str, outcomes: dict[str, dict[str, Any]]
) -> None:
    assert message in outcomes["refusals"]["said"][name]
