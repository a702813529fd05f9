"""The parts of a network: its blocks, embedding, output head, positions and vocabulary.

This module and base/base.py are the only places that read a transformers config for them.
"""

from collections.abc import Container
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """The transformer blocks by module path, in the order they are computed; empty if there are none."""
    return {path: m for path, m in network.named_modules() if isinstance(m, GradientCheckpointingLayer)}


def output_head(network: nn.Module) -> str | None:
    """Path of the layer that computes the outputs (lm_head, score, classifier), if there is one."""
    get_head = getattr(network, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    for path, module in network.named_modules():
        if (head is not None and module is head) or (head is None and path in ("score", "classifier")):
            return str(path)
    return None


def input_embedding(network: Any) -> str | None:
    """Path of the token embedding, if there is one."""
    try:
        embedding = network.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return next((str(path) for path, m in network.named_modules() if m is embedding), None)


def text_config(network: Any) -> Any:
    """The part of the config that describes the language model."""
    return network.config.get_text_config(decoder=True)


def max_positions(network: Any) -> int | None:
    """The longest sequence the network can read, in tokens; None for no limit."""
    limit: int | None = getattr(text_config(network), "max_position_embeddings", None)
    return limit


def attends_ahead(network: Any) -> bool:
    """Whether tokens attend to later ones, as in an encoder; an attention that does not say is taken as causal."""
    text = type(text_config(network))  # a vision tower's attention has another config
    attentions = [m for m in network.modules() if type(getattr(m, "config", None)) is text and hasattr(m, "is_causal")]
    return bool(attentions) and not any(m.is_causal for m in attentions)


def name_in_files(network: Any, name: str, names: Container[str]) -> str | None:
    """The name in a checkpoint's files of the network's parameter `name`: the base model's prefix may be missing there,
    or in the network.
    """
    prefix = f"{getattr(network, 'base_model_prefix', '')}."
    return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), None)
