"""A quantized weight made ready for many products: checked once, then straight to the C library.

The dispatcher and the checks cost some 40 microseconds a call, a quarter of what reading a 4096 x 4096 weight takes.
Decoding makes a call for every layer and token, so where no gradient is asked for and nothing is being traced, this
path is taken; it computes exactly what the op does.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from veneer.kernels import checks, cpu, native
from veneer.kernels.checks import DTYPES
from veneer.kernels.reference import Packed


class FastMatmul:
    """W (O, D) behind its C struct; keeps the tensors alive that the struct points to."""

    def __init__(self, w: Packed, rows: int, cols: int) -> None:
        checks.check_weight("matmul_4bit", w, rows, cols)
        self.w, self.rows, self.cols = w, rows, cols
        self.struct = cpu.as_struct(w, rows, cols)
        self.found = native.library() if w.codes.device.type == "cpu" and cols % w.block == 0 else None

    def __reduce__(self) -> tuple[Any, ...]:
        return FastMatmul, (self.w, self.rows, self.cols)

    def accepts(self, x: Tensor) -> bool:
        """Whether x (..., D) can go straight to the library."""
        return (
            self.found is not None
            and not torch._C._get_tracing_state()
            and type(x) is Tensor
            and x.dtype in (torch.float32, torch.bfloat16)
            and x.is_cpu
            and x.dim() > 0
            and x.shape[-1] == self.cols
            and x.numel() > 0
            and not (x.requires_grad and torch.is_grad_enabled())
            and not torch.compiler.is_compiling()
            and not x.is_neg()  # a view whose sign is not in its numbers yet
            and not x._is_zerotensor()  # has no numbers at all
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._len_torch_function_stack()
            and not torch._C._functorch.maybe_current_level()
            and forward_ad._current_level < 0
        )

    def matmul(self, x: Tensor) -> Tensor:
        """y (..., O) = x (..., D) W^T for an x that `takes` has let through."""
        assert self.found is not None
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.rows)
        n, threads, dtype = x.numel() // self.cols, torch.get_num_threads(), DTYPES[x.dtype]
        run = self.found.lib.veneer_matmul
        cpu.done("matmul_4bit", run(self.found.isa, threads, self.struct, x.data_ptr(), dtype, n, y.data_ptr()))
        return y
