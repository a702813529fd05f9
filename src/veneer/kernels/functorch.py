"""Detect forward-mode AD and torch.func, which operators of torch.library do not support.

They silently drop forward-mode tangents and are not differentiable by torch.func.grad.
"""

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad


def differentiating() -> bool:
    """Whether torch.autograd.forward_ad or torch.func (jvp, grad, vmap ...; not functionalize) is active."""
    return forward_ad._current_level >= 0 or transformed()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # compiled code does not run in others
def transformed() -> bool:
    """Whether a torch.func transform is active."""
    levels = get_interpreter_stack() or ()
    return any(t.key() != TransformType.Functionalize for t in levels)
