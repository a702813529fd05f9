"""torch's fused attention as a CPU runs it, for tensors without data: there torch itself would keep all scores."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def attending_fused_(block: Any) -> None:
    """Let a block compute so wherever it is called from: what runs inside a backward pass sees no mode around that."""
    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with FusedAttention():
            return forward(*args, **kwargs)

    block.forward = run


class FusedAttention(TorchFunctionMode):
    """Inside, `scaled_dot_product_attention` keeps its inputs, its output and a float32 a row and head; no scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _Fused.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    """q (B, H, T, E), k (B, K, T, E), v (B, K, T, F) -> (B, H, T, F)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
