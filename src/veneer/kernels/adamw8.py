"""AdamW with 8-bit state over flat buffers: checks, reference, CPU kernel, operator.

Source: Dettmers et al. 2021, arXiv:2110.02861.  The state is that of bitsandbytes' `AdamW8bit`: codes of dynamic maps,
one absmax per 256 numbers.  The arithmetic is torch's AdamW in float32, weight decay first.
Differs from bitsandbytes' CUDA kernel: a code is always that of the nearest level (there a small negative first moment
keeps its sign).  Gradients must be finite; the training loop checks that.
"""

import ctypes
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.errors import InputError
from veneer.kernels import dynamic_quant, native
from veneer.kernels.checks import check_tensor
from veneer.kernels.cpu import done, map8
from veneer.kernels.dynamic_quant import dynamic_map
from veneer.kernels.ops import Kernel, define

BLOCK = 256
"""Numbers that share an absmax."""


class Moments(NamedTuple):
    """The quantized state of B blocks of 256 numbers."""

    codes1: Tensor
    """(256 B,) uint8: first moment, signed map."""
    codes2: Tensor
    """(256 B,) uint8: second moment, unsigned map."""
    absmax1: Tensor
    """(B,) float32."""
    absmax2: Tensor
    """(B,) float32."""


class Rates(NamedTuple):
    """Hyperparameters of one step, in the order of the operator's arguments."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    step: int
    """Counted from 1."""

    def factors(self) -> dict[str, float]:
        """The scalars of the formula in float64; each is rounded to float32 once (csrc/veneer.h)."""
        return {
            "beta1": self.beta1,
            "beta2": self.beta2,
            "rest1": 1 - self.beta1,
            "rest2": 1 - self.beta2,
            "size": self.lr / (1 - self.beta1**self.step),
            "root": 1 / sqrt(1 - self.beta2**self.step),
            "eps": self.eps,
            "keep": 1 - self.lr * self.decay,
        }


class CAdamW8(ctypes.Structure):
    """`veneer_adamw8`."""

    _fields_ = (
        ("map1", native.Map8),
        ("map2", native.Map8),
        *((name, ctypes.c_float) for name in ("beta1", "beta2", "rest1", "rest2", "size", "root", "eps", "keep")),
    )


def check(values: Tensor, gradients: Tensor, moments: Moments) -> None:
    """Check shapes, dtypes and contiguity."""
    op, n = "adamw_8bit", values.numel()
    if n % BLOCK:
        raise InputError(f"{op}: values has {n} elements, should be a multiple of {BLOCK}")
    for name, tensor in (("values", values), ("gradients", gradients)):
        check_tensor(op, name, tensor, (n,), torch.float32)
    for name, tensor in moments._asdict().items():
        codes = name.startswith("codes")
        check_tensor(op, name, tensor, (n if codes else n // BLOCK,), torch.uint8 if codes else torch.float32)


def decode(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """Codes (256 B,) -> values (256 B,) float32."""
    levels = dynamic_map(signed).levels.to(codes.device)
    return (levels[codes.int()].view(-1, BLOCK) * absmax[:, None]).view(-1)


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """x (256 B,) float32 -> codes of the nearest levels (the lower at a tie), and each block's absmax."""
    codes, absmax = dynamic_quant.encode(x.view(-1, BLOCK), signed)
    return codes.view(-1), absmax


def step_plain(values: Tensor, gradients: Tensor, moments: Moments, rates: Rates) -> None:
    """The reference: each operation is rounded to float32."""
    f = rates.factors()
    m = decode(moments.codes1, moments.absmax1, True) * f["beta1"] + gradients * f["rest1"]
    v = decode(moments.codes2, moments.absmax2, False) * f["beta2"] + gradients * f["rest2"] * gradients
    # torch's float32 root on a CPU may be off by its last bit; MPS has no float64
    root = v.double().sqrt().float() if v.is_cpu else v.sqrt()
    change = m / (root * f["root"] + f["eps"])
    values.copy_(values * f["keep"] - change * f["size"])
    for signed, x, codes, absmax in ((True, m, moments.codes1, moments.absmax1), (False, v, *moments[1::2])):
        for state, new in zip((codes, absmax), encode(x, signed), strict=True):
            state.copy_(new)


def step_cpu(values: Tensor, gradients: Tensor, moments: Moments, rates: Rates) -> None:
    found = native.library()
    if found is None:
        return step_plain(values, gradients, moments, rates)
    how = CAdamW8(map8(dynamic_map(True)), map8(dynamic_map(False)), **rates.factors())
    where = (t.data_ptr() for t in (values, gradients, *moments))
    blocks, threads = values.numel() // BLOCK, torch.get_num_threads()
    if blocks:
        done("adamw_8bit", found.lib.veneer_adamw8_step(found.isa, threads, ctypes.byref(how), blocks, *where))
    return None


def step_fake(values: Tensor, gradients: Tensor, moments: Moments, rates: Rates) -> None:
    return None


def stepper(kernel: Kernel) -> Kernel:
    def op(values: Tensor, gradients: Tensor, *rest: Any) -> None:
        moments = Moments(*rest[:4])
        check(values, gradients, moments)
        kernel(values, gradients, moments, Rates(*rest[4:]))

    return op


define(
    "adamw_8bit_(Tensor(a!) values, Tensor gradients, Tensor(b!) codes1, Tensor(c!) codes2, Tensor(d!) absmax1, "
    "Tensor(e!) absmax2, float lr, float beta1, float beta2, float eps, float decay, int step) -> ()",
    *map(stepper, (step_plain, step_cpu, step_fake)),
)


def adamw_8bit_(values: Tensor, gradients: Tensor, moments: Moments, rates: Rates) -> None:
    """Update values (256 B,) and `moments` in place with one AdamW step."""
    torch.ops.veneer.adamw_8bit_(values, gradients, *moments, *rates)
