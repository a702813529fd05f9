"""Find the transformer blocks of a model: its layers that transformers can checkpoint."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The model's blocks by module path, in the order of the forward pass; empty if it has none."""
    return {path: m for path, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}


def output_head(model: nn.Module) -> str | None:
    """Path of the output layer (lm_head, score, classifier); None without one."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    for path, module in model.named_modules():
        if (head is not None and module is head) or (head is None and path in ("score", "classifier")):
            return str(path)
    return None
