"""int8: one scale per row of W, codes from -127 to 127; the layout of bitsandbytes' `load_in_8bit`.

    code = round(127 w / absmax(row))        w' = code * absmax(row) / 127

Source: Dettmers et al. 2022, arXiv:2208.07339, section 2.1 (row-wise absmax).
Differs from the paper: only the weight is in 8 bits; products are in x's dtype, so there are no outlier columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.errors import ModelError, listed
from veneer.kernels import functorch
from veneer.kernels.reference import PANEL
from veneer.storage.base import STORAGES, Storage, StorageConfig, check_ids, check_matrix


@dataclass(frozen=True, kw_only=True)
class Int8Config(StorageConfig):
    """No settings."""

    storage = "int8"


def unpack(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of codes and their scales -> rows of W in dtype, rounded once."""
    return ((codes * scale[:, None]) * (1 / 127)).to(dtype)


def product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """y (..., O) = x (..., D) W^T; dequantizes a panel of W at a time."""
    step = max(PANEL // codes.shape[1], 1)
    parts = zip(torch.split(codes, step), torch.split(scale, step), strict=True)
    return torch.cat([F.linear(x, unpack(c, s, x.dtype)) for c, s in parts], -1)


class Product(torch.autograd.Function):
    """y = x W^T; dequantizes a panel of W at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return product(x, codes, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        (dy,) = grads
        step = max(PANEL // codes.shape[1], 1)
        dx = torch.zeros(*dy.shape[:-1], codes.shape[1], dtype=torch.float32, device=dy.device)
        for part, c, s in zip(
            torch.split(dy, step, -1), torch.split(codes, step), torch.split(scale, step), strict=True
        ):
            dx += part @ unpack(c, s, dy.dtype)
        return dx.to(dy.dtype), None, None


@STORAGES.add("int8")
class Int8(Storage):
    """W (O, D) as int8 codes (O, D) and float32 absmax (O,)."""

    Config = Int8Config
    codes: Tensor
    absmax: Tensor

    def __init__(self, codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("absmax", absmax, persistent=False)
        self.shape, self.dtype = (codes.shape[0], codes.shape[1]), dtype

    @classmethod
    def of(cls, w: Tensor, config: Int8Config, name: str = "weight") -> Self:
        check_matrix(w, name)
        return cls(*cls.pack(w, name), w.dtype)

    @staticmethod
    def pack(w: Tensor, name: str) -> tuple[Tensor, Tensor]:
        absmax = w.detach().abs().amax(1).float()
        fits = (absmax * 127).isfinite()
        if not bool(fits.all()):
            row = int((~fits).nonzero()[0])
            raise ModelError(f"{name}: row {row} holds numbers that are not finite or too large to quantize")
        scale = torch.where(absmax > 0, 127.0 / absmax, 0.0)
        return (w.detach().float() * scale[:, None]).round().to(torch.int8), absmax

    def dense(self, dtype: torch.dtype) -> Tensor:
        return unpack(self.codes, self.absmax, dtype)

    def put_(self, w: Tensor) -> None:
        if tuple(w.shape) != self.shape:
            raise ModelError(f"the new weight is {tuple(w.shape)}, should be {self.shape}")
        codes, absmax = self.pack(w, "weight")
        self.codes.copy_(codes)
        self.absmax.copy_(absmax)

    def matmul(self, x: Tensor) -> Tensor:
        if functorch.differentiating():
            return product(x, self.codes, self.absmax)
        y: Tensor = Product.apply(x, self.codes, self.absmax)  # type: ignore[no-untyped-call]
        return y

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        check_ids(ids, self.shape[0])
        flat = ids.reshape(-1)
        return unpack(self.codes[flat], self.absmax[flat], dtype).view(*ids.shape, self.shape[1])

    def tensors(self, name: str) -> dict[str, Tensor]:
        module = name.removesuffix("weight")
        return {name: self.codes, f"{module}SCB": self.absmax, f"{module}weight_format": torch.tensor(0).byte()}

    @classmethod
    def recognizes(cls, keys: Mapping[str, Tensor], name: str) -> bool:
        return name in keys and keys[name].dtype == torch.int8

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], name: str) -> Self:
        module = name.removesuffix("weight")
        codes, absmax, kind = (tensors.get(k) for k in (name, f"{module}SCB", f"{module}weight_format"))
        problems = []
        if codes is None or codes.dtype != torch.int8 or codes.dim() != 2:
            problems.append("the weight should be an int8 matrix")
        elif absmax is None or absmax.dtype != torch.float32 or absmax.shape != codes.shape[:1]:
            problems.append(f"{module}SCB should be ({codes.shape[0]},) float32, one absmax per row")
        elif not bool(absmax.isfinite().all()):
            problems.append(f"{module}SCB holds numbers that are not finite")
        weight_format: Any = 0 if kind is None else kind.tolist()
        if weight_format != 0:
            problems.append(f"{module}weight_format is {weight_format}; only 0 (row-major) is supported")
        if problems or codes is None or absmax is None:
            raise ModelError(f"{name} is not a complete 8-bit weight:\n{listed(problems)}\nNothing was loaded.")
        return cls(codes, absmax, torch.float16)
