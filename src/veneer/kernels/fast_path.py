"""Products with a quantized weight that bypass torch's dispatcher: check the weight once, then call the C library.

Dispatcher and checks cost about 40 microseconds per call, a quarter of the time to read a 4096 x 4096 weight, and
decoding makes one call per layer and token. This path is used when no gradient is needed and nothing is being traced;
it computes exactly what the op computes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from veneer.kernels import checks, cpu, native
from veneer.kernels.checks import DTYPES
from veneer.kernels.reference import Packed


class FastMatmul:
    """A weight W (O, D) with its C struct; keeps the tensors alive that the struct points to."""

    def __init__(self, w: Packed, rows: int, cols: int) -> None:
        checks.check_weight("matmul_4bit", w, rows, cols)
        self.w, self.rows, self.cols = w, rows, cols
        self.found = native.library() if w.codes.is_cpu and cols % w.block == 0 else None
        self.struct = None if self.found is None else cpu.as_struct(w, rows, cols)

    def __reduce__(self) -> tuple[Any, ...]:
        return FastMatmul, (self.w, self.rows, self.cols)

    def accepts(self, x: Tensor) -> bool:
        """Whether x (..., D) can be passed to the C library directly."""
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
            and not x.is_neg()  # a lazy negation
            and not x._is_zerotensor()  # has no memory
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._len_torch_function_stack()
            and not torch._C._functorch.maybe_current_level()
            and forward_ad._current_level < 0
        )

    def matmul(self, x: Tensor) -> Tensor:
        """y (..., O) = x (..., D) W^T for an x that `accepts` returned True for."""
        assert self.found is not None
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.rows)
        n, threads, dtype = x.numel() // self.cols, torch.get_num_threads(), DTYPES[x.dtype]
        run = self.found.lib.veneer_matmul
        cpu.done("matmul_4bit", run(self.found.isa, threads, self.struct, x.data_ptr(), dtype, n, y.data_ptr()))
        return y
