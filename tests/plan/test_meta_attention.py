"""The stand-in keeps what torch's own fused attention keeps on a CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from veneer.plan.meta_attention import FusedAttention, attending_fused_


def kept(device: str) -> tuple[int, torch.Size]:
    q, k, v = (torch.empty(1, 4, 32, 16, device=device, requires_grad=True) for _ in range(3))
    sizes: list[int] = []

    def pack(t: torch.Tensor) -> Any:
        sizes.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), FusedAttention():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.sum().backward()  # type: ignore[no-untyped-call]
    assert q.grad is not None and q.grad.shape == q.shape
    return sum(sizes), out.shape


def test_keeps_the_bytes_of_the_real_one() -> None:
    assert kept("meta") == kept("cpu")


def test_a_block_that_is_computed_again_in_the_backward_pass_attends_so_too() -> None:
    names: list[str] = []

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = F.scaled_dot_product_attention(x, x, x, is_causal=True)
            names.append(type(out.grad_fn).__name__)
            return out.sin()

    block = Block()
    attending_fused_(block)
    x = torch.empty(1, 4, 32, 16, device="meta", requires_grad=True)
    out: torch.Tensor = checkpoint(block, x, use_reentrant=False)
    out.backward(torch.empty_like(out))
    assert names == ["_FusedBackward"] * 2
