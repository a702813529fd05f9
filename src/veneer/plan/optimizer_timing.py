"""How long the optimizer takes here for a recipe's trained numbers: clipping and stepping, without any pass."""

import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import nn

from veneer.adapters.part import NamedParameter
from veneer.recipe.settings import Recipe
from veneer.train.optim import build_optimizer
from veneer.train.optim.step_in_backward import StepInBackward

MOST = 1 << 23
"""Numbers that are stepped at most: far more than a processor's cache holds."""
RUNS = 5


def optimizer_seconds(recipe: Recipe, like: list[NamedParameter], trained: int, folder: Path, *, paged: bool) -> float:
    """Of one step over `trained` numbers in tensors like these; measured on at most `MOST`, after a first run.

    paged    whether the state lies on disk, in `folder`
    """
    settings, have = recipe.optimizer, sum(n.parameter.numel() for n in like)
    if settings.name == "adamw":
        settings = settings.model_copy(update={"paged": paged})
    copies = max(1, round(min(trained, MOST) / have))
    named = [replace(n, parameter=nn.Parameter(torch.zeros(n.parameter.shape))) for _ in range(copies) for n in like]
    parameters = [n.parameter for n in named]
    optimizer, ones = build_optimizer(named, settings, folder), [torch.ones_like(p) for p in parameters]
    in_backward, taken = getattr(optimizer, "step_in_backward", None), []
    for _ in range(1 + RUNS):
        optimizer.zero_grad(set_to_none=True)
        if isinstance(in_backward, StepInBackward):
            in_backward.begin()
        torch.autograd.backward(parameters, ones)
        began = time.perf_counter()
        if in_backward is None:
            torch.nn.utils.clip_grad_norm_(parameters, recipe.train.clip or float("inf"))
        optimizer.step()
        taken.append(time.perf_counter() - began)
    return median(taken[1:]) * trained / (copies * have)
