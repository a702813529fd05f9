"""Whether derivatives are computed in a way that operators of torch.library do not take part in.

They drop the tangents of forward mode without a word, and know nothing of torch.func.grad.
"""

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad


def differentiating() -> bool:
    """Inside of torch.autograd.forward_ad and torch.func (jvp, grad, vmap ...), functionalize alone excepted."""
    return forward_ad._current_level >= 0 or transformed()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # compiled code refuses to run in others
def transformed() -> bool:
    """Inside of torch.func."""
    levels = get_interpreter_stack() or ()
    return any(t.key() != TransformType.Functionalize for t in levels)
