"""A short name for a base model's weights, so that an adapter is never put on another base unnoticed."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

SAMPLES = 256


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes and up to 256 evenly spread values of every tensor, rounded to bfloat16.

    The rounding makes one base loaded as float32, bfloat16 or (from bfloat16 values) float16 the same base.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        flat = tensor.detach().reshape(-1)
        step = max(1, -(-flat.numel() // SAMPLES))
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(flat[::step].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def base_fingerprint(model: nn.Module) -> str:
    """The fingerprint of a model's parameters; deltas hang on hooks, so they are not among them."""
    return fingerprint((name, p) for name, p in model.named_parameters())
