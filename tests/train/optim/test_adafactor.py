"""adafactor in a recipe is torch's."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from tests.train.optim.by_torch import WithoutMoments


class TestAdafactor(WithoutMoments):
    own: ClassVar[Mapping[str, Any]] = {"name": "adafactor"}

    def theirs(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(groups)
