"""How a method sees a module of the model: kind, sizes, and the dense weight as (O, D, *kernel)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer.errors import NotFoldable
from veneer.methods.base import FrozenLayer, Geometry

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
UNCALLED = nn.modules.linear.NonDynamicallyQuantizableLinear
"""The output projection of nn.MultiheadAttention, which reads its weight and never calls it: no hook would run."""


def frozen_layer(module: nn.Module, blocks: bool = False) -> FrozenLayer | None:
    """The layer that `module` is, or None if it is none a method can change.

    blocks    whether a module that holds linear layers, a feed-forward block for one, counts as a layer too
    A layer whose weight is computed from other parameters (weight norm) is none: there is no one weight to fold into.
    """
    if blocks and (block := _block(module)) is not None:
        return block
    if isinstance(module, UNCALLED) or (module._parameters.get("weight") is None and not hasattr(module, "dense")):
        return None
    if isinstance(module, nn.Linear):
        return _layer("linear", module.in_features, module.out_features, module)
    if isinstance(module, Conv1D):
        return _layer("linear", module.weight.shape[0], module.weight.shape[1], module)
    if isinstance(module, nn.Embedding):
        return _layer("embedding", module.num_embeddings, module.embedding_dim, module)
    if isinstance(module, CONVS):
        return _layer("conv", module.in_channels, module.out_channels, module)
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return _layer("norm", module.normalized_shape[0], module.normalized_shape[0], module)
    return None


def layer_at(model: nn.Module, path: str) -> FrozenLayer:
    """The frozen layer at `path`, which targeting has found to be one."""
    layer = frozen_layer(model.get_submodule(path), blocks=True)
    assert layer is not None, f"{path} was chosen as a target but is no layer"
    return layer


def is_transposed(module: nn.Module) -> bool:
    """Whether the module's weight is (D, O) in a dense model: GPT-2's Conv1D and embeddings have it so."""
    return isinstance(module, Conv1D | nn.Embedding) or getattr(module, "transposed", False) is True


def dense_weight(module: nn.Module) -> Tensor:
    """The module's weight as float32 (O, D, *kernel), whatever its storage; raises NotFoldable for an unknown one."""
    dense: Callable[[torch.dtype], Tensor] | None = getattr(module, "dense", None)
    if dense is not None:
        return dense(torch.float32)
    stored = module.get_parameter("weight").detach()
    if not stored.is_floating_point():
        raise NotFoldable(f"a {type(module).__name__} keeps its weight as {stored.dtype}, in a layout not known here")
    weight = stored.float()
    return weight.T if is_transposed(module) else weight


def _layer(kind: str, d: int, o: int, module: nn.Module) -> FrozenLayer:
    weight = module._parameters.get("weight")
    bias: Tensor | None = getattr(module, "bias", None)
    scale = getattr(module, "embed_scale", getattr(module, "scalar_embed_scale", 1.0)) if kind == "embedding" else 1.0
    return FrozenLayer(
        kind=kind,  # type: ignore[arg-type]
        in_features=d,
        out_features=o,
        weight=lambda: dense_weight(module),
        has_bias=bias is not None,
        bias=None if bias is None else lambda: module.get_parameter("bias").detach().float(),
        geometry=_geometry(module) if isinstance(module, CONVS) else None,
        device=(next(module.buffers()) if weight is None else weight).device,  # a storage's tensors are buffers
        embed_scale=float(scale),
        padding_idx=module.padding_idx if isinstance(module, nn.Embedding) else None,
    )


def _block(module: nn.Module) -> FrozenLayer | None:
    """A module as one step from the inputs of its first linear layer to the outputs of its last."""
    inside = [layer for m in module.children() if (layer := frozen_layer(m)) is not None and layer.kind == "linear"]
    if not inside:
        return None

    def no_weight() -> Tensor:
        raise NotFoldable("a block of several layers has no one weight")

    return FrozenLayer(
        kind="module",
        in_features=inside[0].in_features,
        out_features=inside[-1].out_features,
        weight=no_weight,
        device=inside[0].device,
    )


def _geometry(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Geometry:
    return Geometry(
        kernel=tuple(module.kernel_size),
        stride=tuple(module.stride),
        padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),
        dilation=tuple(module.dilation),
        groups=module.groups,
        padding_mode=module.padding_mode,
    )
