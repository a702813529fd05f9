"""AdamW's state over a stretch of a flat buffer, in 32 or in 8 bits: what it is made of and how it steps."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from veneer.kernels.adamw8 import Moments, Rates, adamw_8bit_, decode, encode
from veneer.kernels.dynamic_quant import dynamic_map
from veneer.train.optim.flat_params import ALIGN

New = Callable[[int, torch.dtype], Tensor]
"""How many numbers, of which dtype -> zeros."""


class Part(NamedTuple):
    """Where a parameter lies in its stretch."""

    start: int
    numel: int
    shape: torch.Size


class State(ABC):
    """The moments of a stretch of n numbers, a multiple of ALIGN."""

    @staticmethod
    @abstractmethod
    def nbytes(n: int) -> int:
        """What a stretch takes."""

    @abstractmethod
    def within(self, span: slice) -> tuple[Tensor, ...]:
        """The parts of the tensors that a step over `span`, whole blocks, reads and writes."""

    @abstractmethod
    def step_(self, values: Tensor, gradients: Tensor, span: slice, rates: Rates) -> None:
        """Step the values of the stretch that lie in `span`, whole blocks; `values` and `gradients` are that part."""

    @abstractmethod
    def entries(self, part: Part) -> dict[str, Tensor]:
        """Views of a parameter's own part, by the keys of `state_dict()`."""

    @abstractmethod
    def moments(self, part: Part) -> dict[str, Tensor]:
        """A parameter's moments as float32 in its shape."""

    @abstractmethod
    def put_moments_(self, part: Part, moments: dict[str, Tensor]) -> None:
        """Keep these instead."""


class State32(State):
    """float32 moments, stepped by torch's fused kernel."""

    def __init__(self, n: int, new: New, names: tuple[str, str]) -> None:
        self.names, self.first, self.second = names, new(n, torch.float32), new(n, torch.float32)

    @staticmethod
    def nbytes(n: int) -> int:
        return 8 * n

    def within(self, span: slice) -> tuple[Tensor, ...]:
        return self.first[span], self.second[span]

    def step_(self, values: Tensor, gradients: Tensor, span: slice, rates: Rates) -> None:
        torch_adamw(
            [values],
            [gradients],
            [self.first[span]],
            [self.second[span]],
            [],
            [torch.tensor(rates.step - 1.0, device=values.device)],  # counted up inside
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=rates.beta1,
            beta2=rates.beta2,
            lr=rates.lr,
            weight_decay=rates.decay,
            eps=rates.eps,
        )

    def entries(self, part: Part) -> dict[str, Tensor]:
        return {
            name: moment[part.start : part.start + part.numel].view(part.shape)
            for name, moment in zip(self.names, (self.first, self.second), strict=True)
        }

    def moments(self, part: Part) -> dict[str, Tensor]:
        return {name: moment.clone() for name, moment in self.entries(part).items()}

    def put_moments_(self, part: Part, moments: dict[str, Tensor]) -> None:
        for name, moment in self.entries(part).items():
            moment.copy_(moments[name])


class State8(State):
    """Moments as 8-bit codes with an absmax per 256, stepped by our kernel; entries are those of bitsandbytes."""

    def __init__(self, n: int, new: New, _names: tuple[str, str]) -> None:
        blocks = n // ALIGN
        absmax = new(blocks, torch.float32), new(blocks, torch.float32)
        self.kept = Moments(new(n, torch.uint8), new(n, torch.uint8), *absmax)
        self.kept.codes1.fill_(dynamic_map(True).zero)

    @staticmethod
    def nbytes(n: int) -> int:
        return 2 * n + 8 * (n // ALIGN)

    def within(self, span: slice) -> Moments:
        k, blocks = self.kept, slice(span.start // ALIGN, -(-span.stop // ALIGN))
        return Moments(k.codes1[span], k.codes2[span], k.absmax1[blocks], k.absmax2[blocks])

    def step_(self, values: Tensor, gradients: Tensor, span: slice, rates: Rates) -> None:
        adamw_8bit_(values, gradients, self.within(span), rates)

    def entries(self, part: Part) -> dict[str, Tensor]:
        k = self.within(slice(part.start, part.start + part.numel))
        codes = {"state1": k.codes1.view(part.shape), "state2": k.codes2.view(part.shape)}
        maps = {"qmap1": dynamic_map(True).levels, "qmap2": dynamic_map(False).levels}
        return {**codes, **maps, "absmax1": k.absmax1, "absmax2": k.absmax2}

    def moments(self, part: Part) -> dict[str, Tensor]:
        k = self._whole(part)
        decoded = decode(k.codes1, k.absmax1, True), decode(k.codes2, k.absmax2, False)
        return {f"state{i + 1}": d[: part.numel].view(part.shape) for i, d in enumerate(decoded)}

    @torch.no_grad()
    def put_moments_(self, part: Part, moments: dict[str, Tensor]) -> None:
        """Entries that only became 0 leave the others as they are; anything else is quantized anew."""
        k, before = self._whole(part), self.moments(part)
        for i, (codes, absmax) in enumerate(((k.codes1, k.absmax1), (k.codes2, k.absmax2))):
            now, was = moments[f"state{i + 1}"], before[f"state{i + 1}"]
            if torch.equal(now[now != 0], was[now != 0]):
                codes[: part.numel].masked_fill_(now.reshape(-1) == 0, dynamic_map(i == 0).zero)
                continue
            padded = torch.zeros_like(codes, dtype=torch.float32)
            padded[: part.numel] = now.reshape(-1)
            for kept, new in zip((codes, absmax), encode(padded, i == 0), strict=True):
                kept.copy_(new)

    def _whole(self, part: Part) -> Moments:
        """A parameter's blocks, to the end of the last."""
        return self.within(slice(part.start, part.start + -(-part.numel // ALIGN) * ALIGN))


def from_bitsandbytes(own: dict[str, Tensor], saved: dict[str, Any]) -> dict[str, Tensor]:
    """One parameter's saved entries as our own would be: unnested, a plain count as a tensor, 32-bit state of a small
    parameter quantized where ours is."""
    flat: dict[str, Any] = {k: v for k, v in saved.items() if not isinstance(v, dict)}
    for nested in (v for v in saved.values() if isinstance(v, dict)):
        flat |= nested
    flat = {k: v if isinstance(v, Tensor) else torch.tensor(float(v)) for k, v in flat.items()}
    if "absmax1" in own and "absmax1" not in flat and {"state1", "state2"} <= flat.keys():
        for i in (1, 2):
            moment = flat[f"state{i}"].reshape(-1).float()
            padded = torch.cat([moment, moment.new_zeros(-len(moment) % ALIGN)])
            codes, flat[f"absmax{i}"] = encode(padded, i == 1)
            flat[f"state{i}"] = codes[: len(moment)].view(own[f"state{i}"].shape)
            flat[f"qmap{i}"] = own[f"qmap{i}"]
    return flat
