"""AdamW over one flat buffer: one call of a fused kernel for each group of parameters, with 32-bit or 8-bit state.

Source: Loshchilov and Hutter 2017, arXiv:1711.05101; 8-bit state: Dettmers et al. 2021, arXiv:2110.02861.  Of torch's
three implementations the fused one is the fastest on a CPU, and faster still over one buffer than over many tensors.
With `bits: 8` matrices of any size have 8-bit state; biases and scales keep 32 bits.  (bitsandbytes goes by size: less
than 4096 numbers keep 32 bits.  Blocks have an absmax of their own, so a small matrix loses no more than a large one.)
"""

import mmap
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from veneer import machine
from veneer.base.device import Device
from veneer.errors import ConfigError, TrainingError
from veneer.kernels.adamw8 import Rates
from veneer.recipe.settings import OptimizerSettings
from veneer.train.optim.adamw_state import Part, State, State8, State32, from_bitsandbytes
from veneer.train.optim.flat_params import Flat
from veneer.train.optim.paged_state import Pages
from veneer.train.optim.param_groups import NOT_DECAYED, OPTIMIZERS, Groups
from veneer.train.optim.step_in_backward import StepInBackward

CHUNK = 2**22
"""Numbers that are stepped at a time where state is paged."""
NAMES = {32: ("exp_avg", "exp_avg_sq"), 8: ("state1", "state2")}
"""What torch and bitsandbytes call the moments."""
BETAS = (0.9, 0.999)
"""Of the paper."""
CONSTANT = ("qmap1", "qmap2")
"""Entries that never change."""


class FlatAdamW(torch.optim.Optimizer):
    """AdamW; `state[parameter]` holds views of the flat state under torch's keys, or with 8 bits bitsandbytes'."""

    def __init__(
        self,
        groups: Groups,
        betas: tuple[float, float],
        eps: float,
        bits: int = 32,
        paged: bool | Literal["auto"] = False,
        folder: Path | None = None,
        in_backward: bool = False,
    ) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})
        self.flat = Flat([p for group in self.param_groups for p in group["params"]], gradients=not in_backward)
        self.step_in_backward = StepInBackward(self.flat.parameters, self._step_one) if in_backward else None
        self._before: tuple[Tensor, ...] = ()
        self.spans = self.flat.spans([len(group["params"]) for group in self.param_groups])
        self.steps = [torch.zeros(()) for _ in self.flat.parameters]
        """Steps done, for each parameter as torch has it; here all are equal."""
        self.pages = self._paged(paged, bits, folder)
        self.kept = [
            state_type(group["role"], bits)(len(span), self._new, NAMES[bits]) for group, span in self._groups()
        ]
        self._places: dict[Tensor, tuple[dict[str, Any], State, Part]] = {}
        places = iter(zip(self.flat.parameters, self.flat.starts, self.steps, strict=False))
        for (group, span), kept in zip(self._groups(), self.kept, strict=True):
            for _ in group["params"]:
                p, start, steps = next(places)
                part = Part(start - span.start, p.numel(), p.shape)
                self._places[p] = group, kept, part
                self.state[p] = {"step": steps, **kept.entries(part)}

    def _paged(self, paged: bool | Literal["auto"], bits: int, folder: Path | None) -> Pages | None:
        """The scratch file of paged state, None for state in memory; auto pages what would take half of what is free.

        Raises ConfigError where paging is asked for and the parameters are not on the CPU.
        """
        device = Device(self.flat.device)
        if not device.is_cpu:
            if paged is True:
                refuse_paged_state(device)
            return None
        need = sum(state_type(group["role"], bits).nbytes(len(span)) for group, span in self._groups())
        available = machine.available_bytes()
        if paged is False or (paged == "auto" and (available is None or need <= available // 2)):
            return None
        return Pages(folder or machine.cache_dir(), need + 4 * mmap.PAGESIZE * len(self.spans))

    def _new(self, count: int, dtype: torch.dtype) -> Tensor:
        if self.pages is not None:
            return self.pages.new(count, dtype)
        return torch.zeros(count, dtype=dtype, device=self.flat.device)

    def _groups(self) -> list[tuple[dict[str, Any], range]]:
        return list(zip(self.param_groups, self.spans, strict=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step what the backward pass did not, and count the step; raises TrainingError if a gradient is missing."""
        if self.step_in_backward is None:
            gradients = self.flat.gather()
            for (group, span), kept in zip(self._groups(), self.kept, strict=True):
                part = slice(span.start, span.stop)
                self._advance(group, kept, slice(0, len(span)), self.flat.values[part], gradients[part])
        else:
            with self.step_in_backward.stepping():
                pass
            missing = len(self.flat.parameters) - len(self.step_in_backward.norms)
            self.step_in_backward.begin()
            if missing:
                raise TrainingError(
                    f"{missing} of {len(self.flat.parameters)} parameters have no gradient to step with"
                )
        self._before = ()
        torch._foreach_add_(self.steps, 1)

    def _step_one(self, index: int, gradient: Tensor) -> None:
        """Step one parameter, before `step` counts."""
        group, kept, part = self._places[self.flat.parameters[index]]
        place, row = self.flat.place(index), self.flat.padded(index, gradient)
        self._advance(group, kept, slice(part.start, part.start + len(row)), self.flat.values[place], row)

    def _advance(self, group: dict[str, Any], kept: State, span: slice, values: Tensor, gradients: Tensor) -> None:
        """Step a part of a group, whole blocks; `span` is where it lies in the group, the tensors are that part."""
        beta1, beta2 = group["betas"]
        rates = Rates(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], int(self.steps[0]) + 1)
        chunk = CHUNK if self.pages is not None else max(len(values), 1)
        for start in range(0, len(values), chunk):
            part = slice(start, min(start + chunk, len(values)))
            here = slice(span.start + part.start, span.start + part.stop)
            if self.pages is not None:
                self.pages.ahead(kept.within(slice(here.stop, min(here.stop + chunk, span.stop))))
            kept.step_(values[part], gradients[part], here, rates)
            if self.pages is not None:
                self.pages.behind(kept.within(here), self._before)
                self._before = kept.within(here)

    def state_bytes(self) -> int:
        """What the moments take."""
        whole = [kept.within(slice(0, len(span))) for kept, span in zip(self.kept, self.spans, strict=True)]
        return sum(t.nbytes for tensors in whole for t in tensors)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """The parameter's moments as float32, the first moment first."""
        _, kept, part = self._places[parameter]
        return kept.moments(part)

    def put_moments_(self, parameter: Tensor, moments: dict[str, Tensor]) -> None:
        """Keep these instead; in 8 bits, entries that only became 0 leave the others as they are."""
        _, kept, part = self._places[parameter]
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


def state_type(role: str, bits: int) -> type[State32 | State8]:
    """How a group of this role keeps its state."""
    return State8 if bits == 8 and role not in NOT_DECAYED else State32


@OPTIMIZERS.add("adamw")
def adamw(groups: Groups, settings: OptimizerSettings, folder: Path | None) -> torch.optim.Optimizer:
    """AdamW; the groups bring their own rate and decay.

    Raises ConfigError for 8 bits where nothing would be kept in them, and for paged state off the CPU.
    """
    refuse_idle_bits(groups, settings)
    betas, paged = settings.betas or BETAS, settings.paged
    return FlatAdamW(groups, betas, settings.eps, settings.bits, paged, folder, settings.in_backward)


def refuse_idle_bits(groups: Groups, settings: OptimizerSettings) -> None:
    """Raise ConfigError for 8 bits where nothing would be kept in them."""
    roles = {group["role"] for group in groups}
    if settings.bits == 8 and roles <= set(NOT_DECAYED):
        raise ConfigError(
            f"optimizer.bits is 8, but this method trains only {' and '.join(sorted(roles))} parameters, whose state "
            "stays in 32 bits; leave it at 32"
        )


def refuse_paged_state(device: Device) -> None:
    """Raise ConfigError for a device whose state cannot be paged to disk."""
    if not device.is_cpu:
        raise ConfigError(
            f"optimizer.paged is true, but only the CPU's memory is paged, and the adapter is on {device}; set it to "
            "false, or optimizer.bits to 8"
        )
