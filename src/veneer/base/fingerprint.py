"""A short name for a base model's weights, so that an adapter is never put on another base unnoticed.

A base whose weights are quantized is another base than the dense one, since an adapter trained on it makes up for its
errors: NF4 of X has one fingerprint, FP4 of X and X itself have others.
"""

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from veneer.disk.prefetch import ask_for
from veneer.storage.layers import Stored

SAMPLES = 256
OWN_ROWS = "own_rows"
"""Attribute of a parameter with added rows: how many are the base's own."""


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes and up to 256 evenly spread values of every tensor, rounded to bfloat16.

    The rounding makes one base loaded as float32, bfloat16 or (from bfloat16 values) float16 the same base.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        flat = tensor.detach().reshape(-1)
        step = _step(flat)
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(flat[::step].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _step(tensor: Tensor) -> int:
    """From one value that counts to the next."""
    return max(1, -(-tensor.numel() // SAMPLES))


def base_fingerprint(model: nn.Module) -> str:
    """The fingerprint of a model's parameters and stored weights; deltas hang on hooks, so they are not among them."""
    own = ((name, p[: getattr(p, OWN_ROWS, None)] if p.dim() else p) for name, p in model.named_parameters())
    return fingerprint([*own, *_stored(model)])


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The codes of every stored weight (whole numbers up to 255: bfloat16 has them exactly), under a name that says how
    they are kept.

    Absmax is left out: its mean, and so its nested codes, depend on the order of a sum and differ between machines.
    """
    for path, module in model.named_modules():
        if isinstance(module, Stored) and module.saved:
            name = f"{path}.weight"
            kept = module.storage.tensors(name)
            parts = (
                f"{key.removeprefix(name)} {'' if 'quant_state' in key else tuple(part.shape)}"
                for key, part in sorted(kept.items())
                if key != name
            )
            codes = kept[name]
            if module.storage.read_ahead:  # else reading on from each is what the first use does anyway
                ask_for(codes, _step(codes))
            yield " ".join([name, *parts]), codes
