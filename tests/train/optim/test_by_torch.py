"""sgd and adafactor in a recipe: torch's own steps by group; resumed to the same bytes; others' settings refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.optim.test_adamw import run, shapes
from tests.train.test_loop import interrupted
from veneer.errors import ConfigError
from veneer.train.loop import train
from veneer.train.optim import build_optimizer
from veneer.train.settings import OptimizerSettings, Recipe

Make = Callable[..., Recipe]
THEIRS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adafactor": torch.optim.Adafactor,
}
OWN: dict[str, dict[str, Any]] = {"sgd": {"name": "sgd", "momentum": 0.9}, "adafactor": {"name": "adafactor"}}
both = pytest.mark.parametrize("name", OWN)


@both
def test_each_role_steps_at_its_own_rate(name: str) -> None:
    ours, theirs = shapes(), shapes()
    run(build_optimizer(ours, OptimizerSettings(lr=1e-2, lr_ratio=4, **OWN[name])), ours, 3)
    groups = [{"params": [n.parameter], "lr": 4e-2 if n.role == "out" else 1e-2} for n in theirs]
    run(THEIRS[name](groups), theirs, 3)
    assert all(torch.equal(a.parameter, b.parameter) for a, b in zip(ours, theirs, strict=True))


@both
def test_an_interrupted_run_ends_with_the_same_bytes(job: Make, name: str) -> None:
    whole, broken = (job(run, optimizer={**OWN[name], "lr": 0.01}) for run in ("whole", "broken"))
    train(whole)
    interrupted(broken, 3)
    assert train(broken)[0].resumed_from == 3
    a, b = (Path(r.run, "adapter", "adapter_model.safetensors").read_bytes() for r in (whole, broken))
    assert a == b


@both
@pytest.mark.parametrize("more", [{"bits": 8}, {"paged": True}, {"in_backward": True}, {"eps": 1e-6}])
def test_what_it_does_not_have_is_refused(job: Make, name: str, more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"optimizer.{next(iter(more))} is given, but {name} does not have it"):
        job(optimizer={**OWN[name], **more})


@both
def test_restarts_that_find_nothing_to_reset_are_refused(job: Make, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"restarts.reset is magnitude, but {name} "):
        job(optimizer={"name": name}, restarts={"every": 2, "reset": "magnitude"})
