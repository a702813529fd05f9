"""AdamW over one flat buffer: one call of a fused kernel for each group of parameters, with 32-bit or 8-bit state.

Source: Loshchilov and Hutter 2017, arXiv:1711.05101; 8-bit state: Dettmers et al. 2021, arXiv:2110.02861.  Of torch's
three implementations the fused one is the fastest on a CPU, and faster still over one buffer than over many tensors.
With `bits: 8` matrices of any size have 8-bit state; biases and scales keep 32 bits.  (bitsandbytes goes by size: less
than 4096 numbers keep 32 bits.  Blocks have an absmax of their own, so a small matrix loses no more than a large one.)
"""

from typing import Any

import torch
from torch import Tensor

from veneer.errors import ConfigError, TrainingError
from veneer.kernels.adamw8 import Rates
from veneer.train.optim.flat import Flat
from veneer.train.optim.groups import NOT_DECAYED, OPTIMIZERS, Groups
from veneer.train.optim.state import Part, State, State8, State32, from_bitsandbytes
from veneer.train.settings import OptimizerSettings

CONSTANT = ("qmap1", "qmap2")
"""Entries that never change."""


class FlatAdamW(torch.optim.Optimizer):
    """AdamW; `state[parameter]` holds views of the flat state under torch's keys, or with 8 bits bitsandbytes'."""

    def __init__(self, groups: Groups, betas: tuple[float, float], eps: float, bits: int = 32) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})
        self.flat = Flat([p for group in self.param_groups for p in group["params"]])
        self.spans = self.flat.spans([len(group["params"]) for group in self.param_groups])
        self.steps = [torch.zeros(()) for _ in self.flat.parameters]
        """Steps done, for each parameter as torch has it; here all are equal."""
        self.kept = [self._new_state(group["role"], len(span), bits) for group, span in self._groups()]
        self._places: dict[Tensor, tuple[State, Part]] = {}
        places = iter(zip(self.flat.parameters, self.flat.starts, self.steps, strict=False))
        for (group, span), kept in zip(self._groups(), self.kept, strict=True):
            for _ in group["params"]:
                p, start, steps = next(places)
                part = Part(start - span.start, p.numel(), p.shape)
                self._places[p] = kept, part
                self.state[p] = {"step": steps, **kept.entries(part)}

    def _new_state(self, role: str, n: int, bits: int) -> State:
        def new(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=self.flat.device)

        if bits == 32:
            return State32(n, new)
        return State32(n, new, ("state1", "state2")) if role in NOT_DECAYED else State8(n, new)

    def _groups(self) -> list[tuple[dict[str, Any], range]]:
        return list(zip(self.param_groups, self.spans, strict=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every parameter; raises TrainingError if one has no gradient."""
        gradients = self.flat.gather()
        for (group, span), kept in zip(self._groups(), self.kept, strict=True):
            part = slice(span.start, span.stop)
            kept.step_(self.flat.values[part], gradients[part], slice(0, len(span)), self._rates(group))
        torch._foreach_add_(self.steps, 1)

    def _rates(self, group: dict[str, Any]) -> Rates:
        """What the next step of this group takes."""
        beta1, beta2 = group["betas"]
        return Rates(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], int(self.steps[0]) + 1)

    def state_bytes(self) -> int:
        """What the moments take."""
        return sum(t.nbytes for kept in self.kept for t in kept.tensors)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's moments as float32, the first moment first."""
        kept, part = self._places[parameter]
        return kept.moments(part)

    def put_moments_(self, parameter: Tensor, moments: dict[str, Tensor]) -> None:
        """Keep these instead; in 8 bits, entries that only became 0 leave the others as they are."""
        kept, part = self._places[parameter]
        kept.put_moments_(part, moments)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put in place a state of `state_dict()`, or of torch's AdamW or bitsandbytes' over the same parameters.

        Raises TrainingError, with nothing changed, for one of other parameters or of other 8-bit levels.
        """
        own = [self.state[p] for p in self.flat.parameters]
        saved = {i: from_bitsandbytes(own[i], e) if i < len(own) else e for i, e in state_dict["state"].items()}
        wanted = {(i, key): tensor.shape for i, entries in enumerate(own) for key, tensor in entries.items()}
        found = {(i, key): tensor.shape for i, entries in saved.items() for key, tensor in entries.items()}
        differing = {f"{i}.{key}" for (i, key), _ in wanted.items() ^ found.items()}
        if not differing:
            differing = {
                f"{i}.{key}" for i, key in wanted if key in CONSTANT and not torch.equal(own[i][key], saved[i][key])
            }
        if differing:
            listed = ", ".join(sorted(differing)[:8])
            raise TrainingError(f"the optimizer's state is of other parameters; these differ: {listed}")
        for i, key in wanted:
            if key not in CONSTANT:
                own[i][key].copy_(saved[i][key])
        for group, kept in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group |= {key: value for key, value in kept.items() if key in ("lr", "betas", "eps", "weight_decay")}


@OPTIMIZERS.add("adamw")
def adamw(groups: Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW; the groups bring their own rate and decay.

    Raises ConfigError for 8 bits where nothing would be kept in them.
    """
    roles = {group["role"] for group in groups}
    if settings.bits == 8 and roles <= set(NOT_DECAYED):
        raise ConfigError(
            f"optimizer.bits is 8, but this method trains only {' and '.join(sorted(roles))} parameters, whose state "
            "stays in 32 bits; leave it at 32"
        )
    return FlatAdamW(groups, settings.betas, settings.eps, settings.bits)
