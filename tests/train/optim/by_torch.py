"""What holds for every optimizer whose steps are a library's: its own steps by group, exact resumption, refusals."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.train.optim.test_adamw import run, shapes
from tests.train.test_loop import interrupted
from veneer.errors import ConfigError
from veneer.recipe.settings import OptimizerSettings, Recipe
from veneer.train.optim import build_optimizer
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]


class ByTorch:
    """To be inherited by the tests of one optimizer."""

    own: ClassVar[Mapping[str, Any]]
    """The section `optimizer` of a recipe."""

    def theirs(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The library's, made without ours."""
        raise NotImplementedError

    def test_each_role_steps_at_its_own_rate(self) -> None:
        ours, theirs = shapes(), shapes()
        run(build_optimizer(ours, OptimizerSettings(lr=1e-2, lr_ratio=4, **self.own)), ours, 3)
        groups = [{"params": [n.parameter], "lr": 4e-2 if n.role == "out" else 1e-2} for n in theirs]
        run(self.theirs(groups), theirs, 3)
        assert all(torch.equal(a.parameter, b.parameter) for a, b in zip(ours, theirs, strict=True))

    def test_an_interrupted_run_ends_with_the_same_bytes(self, job: Make) -> None:
        whole, broken = (job(run, optimizer={**self.own, "lr": 0.01}) for run in ("whole", "broken"))
        train_recipe(whole)
        interrupted(broken, 3)
        assert train_recipe(broken)[0].resumed_from == 3
        a, b = (Path(r.run, "adapter", "adapter_model.safetensors").read_bytes() for r in (whole, broken))
        assert a == b

    @pytest.mark.parametrize("more", [{"bits": 8}, {"paged": True}, {"in_backward": True}, {"eps": 1e-6}])
    def test_what_it_does_not_have_is_refused(self, job: Make, more: dict[str, Any]) -> None:
        with pytest.raises(
            ConfigError, match=rf"optimizer.{next(iter(more))} is given, but {self.own['name']} does not have it"
        ):
            job(optimizer={**self.own, **more})


class WithoutMoments(ByTorch):
    """And whose state has no moments that a restart could prune."""

    def test_restarts_that_find_nothing_to_reset_are_refused(self, job: Make) -> None:
        name = self.own["name"]
        with pytest.raises(ConfigError, match=rf"restarts.reset is magnitude, but {name} "):
            job(optimizer={"name": name}, restarts={"every": 2, "reset": "magnitude"})
