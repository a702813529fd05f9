"""The transformer's blocks: what transformers calls layers that can be checkpointed."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The model's blocks by module path, in the order in which they are computed; empty if it has none."""
    return {path: m for path, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
