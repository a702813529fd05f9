"""Multiply with bitsandbytes' kernels: the tensors of a 4-bit storage, bitsandbytes' arithmetic.

`auto` uses them on CUDA (base/load.py); on a CPU they can be chosen, which is how this code is tested. It has not been
run on CUDA.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from veneer.errors import ConfigError, ModelError
from veneer.kernels.reference import Packed

Backend = Literal["auto", "veneer", "bitsandbytes"]
BACKENDS: tuple[Backend, ...] = ("auto", "veneer", "bitsandbytes")
NESTED_BLOCK = 256
"""The only one that its kernels support."""


@cache
def installed() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


def check(packed: Packed, shape: tuple[int, int], name: str) -> None:
    """Raise ModelError for a weight W (O, D) that bitsandbytes misreads or does not support.

    On a CPU these are all weights whose rows are not a multiple of the block: version 0.50.2 misreads some (see
    `misread_on_cpu`), and its linear layers fail on all of them outside training.
    Raises ConfigError if bitsandbytes is not installed.
    """
    if not installed():
        raise ConfigError("storage.backend is bitsandbytes, which is not installed; run pip install bitsandbytes")
    if packed.codes.is_cpu and shape[1] % packed.block:
        raise ModelError(
            f"{name}: its rows of {shape[1]} are not a multiple of the block of {packed.block}, which bitsandbytes "
            "misreads on a CPU; set storage.backend to veneer, or storage.block to a divisor"
        )
    if packed.nested_absmax is not None and packed.nested_block != NESTED_BLOCK:
        raise ModelError(
            f"{name}: its absmax are quantized in blocks of {packed.nested_block}, bitsandbytes' kernels take "
            f"{NESTED_BLOCK} only; set storage.backend to veneer"
        )


def misread_on_cpu(shape: tuple[int, int], block: int) -> bool:
    """Whether bitsandbytes 0.50.2 dequantizes a weight W (O, D) wrongly on a CPU with AVX-512.

    Its AVX-512 kernel, used for rows of a multiple of 16, looks absmax up as if each row started a new block. That is
    right if it does, or if there is only one block. Blocks of 2048 and more use another kernel, which is right.
    """
    o, d = shape
    return d % 16 == 0 and d % block != 0 and block < 2048 and o > 1 and o * d > block


def matmul(x: Tensor, packed: Packed, shape: tuple[int, int], quant_type: str) -> Tensor:
    """y (..., O) = x (..., D) W^T in x's dtype, with a gradient for x."""
    import bitsandbytes

    multiply: Any = bitsandbytes.matmul_4bit  # type: ignore[attr-defined]
    y: Tensor = multiply(x, packed.codes.view(-1, 1), quant_state=_state(x.dtype, packed, shape, quant_type))
    return y


def _state(dtype: torch.dtype, packed: Packed, shape: tuple[int, int], quant_type: str) -> Any:
    """W as bitsandbytes' QuantState, dequantized to `dtype`."""
    import bitsandbytes.functional

    QuantState: Any = bitsandbytes.functional.QuantState
    nested = offset = None
    if packed.nested_absmax is not None:
        nested = QuantState(
            absmax=packed.nested_absmax, code=packed.nested_levels, blocksize=packed.nested_block, dtype=torch.float32
        )
        offset = torch.tensor(packed.offset, device=packed.codes.device)
    return QuantState(
        absmax=packed.absmax,
        shape=torch.Size(shape),
        code=packed.levels,
        blocksize=packed.block,
        quant_type=quant_type,
        dtype=dtype,
        offset=offset,
        state2=nested,
    )
