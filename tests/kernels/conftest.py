"""Every test that asks for `isa` runs once in plain torch and once with each instruction set this machine has."""

import platform
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from veneer.kernels import native

HERE = ["absent", "scalar", "neon"] if platform.machine() in ("aarch64", "arm64") else ["absent", *native.ISAS[:4]]


@pytest.fixture(params=HERE)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of the instruction set in use, or "absent" without the C library."""
    name: str = request.param
    if name == "absent":
        off = native.Status(False, None, None, "turned off by a test")
        monkeypatch.setattr(native, "load", lambda: off)
        yield name
        return
    found = native.load()
    if isinstance(found, native.Status):
        pytest.skip(f"needs the C library: {found.reason}")
    if not found.lib.veneer_has(native.ISAS.index(name)):
        pytest.skip(f"this machine has no {name}")
    chosen = replace(found, isa=native.ISAS.index(name))
    monkeypatch.setattr(native, "load", lambda: chosen)
    yield name


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
