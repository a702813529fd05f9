"""The registry and reading by layout; what every storage owes stands in tests/contracts/test_storages.py."""

import pytest
import torch

from veneer.errors import ConfigError, ModelError
from veneer.storage import STORAGES, config_from, from_tensors
from veneer.storage.base import check_ids


def test_what_there_is() -> None:
    assert list(STORAGES) == ["dense", "fp4", "int8", "nf4"]
    with pytest.raises(ConfigError, match=r"there is no storage 'nf5'\. Did you mean 'nf4'\? Known: dense, fp4"):
        STORAGES["nf5"]


def test_unknown_settings_are_refused_with_close_ones() -> None:
    with pytest.raises(ConfigError, match=r"storage nf4 has no setting 'doublequant'\. Did you mean 'double_quant'\?"):
        config_from("nf4", {"doublequant": True})
    with pytest.raises(ConfigError, match="It has: none"):
        config_from("dense", {"block": 64})


def test_a_layout_nobody_knows_is_refused() -> None:
    with pytest.raises(ModelError, match=r"w: no storage has this layout; found w\.scales"):
        from_tensors({"w.scales": torch.ones(1)}, "w")
    with pytest.raises(ModelError, match=r"w: no storage has this layout; found no tensor of this name"):
        from_tensors({"v": torch.ones(1)}, "w")


def test_row_numbers_outside_are_refused() -> None:
    check_ids(torch.empty(0, dtype=torch.int64), 3)
    with pytest.raises(IndexError, match=r"ids from -1 to 3 are outside \[0, 3\)"):
        check_ids(torch.tensor([-1, 3]), 3)
