"""The dynamic maps against bitsandbytes' own and against published entries."""

import pytest
import torch

from veneer.kernels.dynamic_quant import dynamic_map


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_bitsandbytes(signed: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(dynamic_map(signed).levels, bnb.create_dynamic_map(signed=signed))


def test_entries() -> None:
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert [signed.levels[i].item() for i in (0, 127, 128, 254, 255)] == pytest.approx(
        [-0.992968738, 0, 5.5e-7, 0.992968738, 1]
    )
    assert [unsigned.levels[i].item() for i in (0, 1, 254, 255)] == pytest.approx([0, 3.25e-7, 0.996484399, 1])
    for table in (signed, unsigned):
        assert table.levels[table.zero] == 0
        assert (table.bounds.diff() > 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_the_lines_find_every_level(signed: bool) -> None:
    """start < |x|: the decade; slope |x| + offset, rounded down, |x| held to the last level of its decade: the code."""
    table = dynamic_map(signed)
    start, slope, offset, most = table.lines.double()
    for code, level in enumerate(table.levels.tolist()):
        if level >= 0:
            decade = int((start[1:9] < level).sum())
            line = torch.floor(slope[decade] * min(level, most[decade]) + offset[decade])
            assert line == code - table.zero
