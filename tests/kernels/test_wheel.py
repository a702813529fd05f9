"""The wheel carries the kernels' sources, and the built library where there is a compiler."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from veneer.kernels import native

ROOT = Path(__file__).parents[2]


def test_a_wheel_has_the_kernels(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"veneer/kernels/csrc/{f.name}" for f in (ROOT / "csrc").iterdir() if f.suffix in (".h", ".cpp")}
    assert sources | {"veneer/kernels/csrc/FLAGS"} <= names
    data = {f"veneer/cli/demo_data/{f.name}" for f in (ROOT / "src/veneer/cli/demo_data").iterdir()}
    assert len(data) == 4 and data <= names
    assert not any("tests" in n or n.startswith("demo/") for n in names)
    built = native.find_compiler() is not None
    assert ("veneer/kernels/libveneer.so" in names) == built
    assert wheel.name.endswith("-none-any.whl") != built
