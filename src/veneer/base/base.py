"""A base model ready for use: the frozen network, its tokenizer, and the parts that others ask for."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.base.device import CPU, Device
from veneer.base.fingerprint import base_fingerprint
from veneer.base.storage_config import BaseStorage, storage_of
from veneer.errors import ConfigError, ModelError, did_you_mean
from veneer.models.blocks import blocks_of, input_embedding, max_positions, output_head, text_config


class Attachable(Protocol):
    """An adapter, as far as a base is concerned."""

    facts: dict[str, Any]
    """What its folder says of its training: recipe, data, metrics."""

    def attach(self) -> Any: ...

    def detach(self) -> Any: ...


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen model; nobody else reads its transformers config."""

    network: Any
    """A transformers PreTrainedModel in eval mode; no parameter requires a gradient."""
    tokenizer: Any = None
    name: str = ""
    """As the user named it."""
    folder: Path | None = None
    """The local folder it was read from; None for a network that was made in Python."""
    device: Device = CPU
    adapters: dict[str, Attachable] = field(default_factory=dict)
    """Adapters that were loaded under a name, for `using`."""
    attached: list[Attachable] = field(default_factory=list)
    """The adapters that change the outputs now; they enter and leave this list themselves."""

    @classmethod
    def of(cls, network: nn.Module, tokenizer: Any = None, name: str = "", folder: Path | None = None) -> "Base":
        """A transformers model of your own as a base, frozen and in eval mode."""
        network.eval().requires_grad_(False)
        return cls(network, tokenizer, name, folder, Device(next(network.parameters()).device))

    @property
    def files(self) -> Path:
        """The folder it was read from.  Raises ConfigError for a network that was made in Python."""
        if self.folder is None:
            raise ConfigError(f"this {self.kind} was not read from a folder, so there are no files to merge into")
        return self.folder

    @property
    def kind(self) -> str:
        """The architecture's class name, for messages."""
        return type(self.network).__name__

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.network.dtype
        return dtype

    @property
    def storage(self) -> BaseStorage | None:
        """How the linear layers are stored; None if they are dense."""
        return storage_of(self.network)

    @property
    def fingerprint(self) -> str:
        """A short name for the weights as they are now."""
        return base_fingerprint(self.network)

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        """Transformer blocks by module path, in the order they are computed."""
        return blocks_of(self.network)

    @property
    def transformer(self) -> Any:
        """The network without its output head."""
        return self.network.base_model

    @property
    def decoder(self) -> Any:
        """The module that embeds tokens and runs the blocks: the transformer, or the decoder in it that runs (OPT)."""
        decoder = self.network.get_decoder()
        return decoder if isinstance(decoder, PreTrainedModel) else self.transformer  # ModernBERT's is its head

    @cached_property
    def head_path(self) -> str | None:
        """Module path of the output head."""
        return output_head(self.network)

    @property
    def head(self) -> Any:
        """The output head.  Raises ModelError if there is none."""
        if self.head_path is None:
            raise ModelError(f"{self.kind} has no output head; give a causal language model")
        return self.network.get_submodule(self.head_path)

    @cached_property
    def embedding_path(self) -> str | None:
        """Module path of the token embedding."""
        return input_embedding(self.network)

    @property
    def embedding(self) -> nn.Module:
        """The token embedding.  Raises ModelError if there is none."""
        if self.embedding_path is None:
            raise ModelError(f"{self.kind} has no token embedding; give a language model")
        embedding: nn.Module = self.network.get_submodule(self.embedding_path)
        return embedding

    @property
    def embedding_rows(self) -> int:
        """Rows of the token embedding."""
        return int(self.embedding.num_embeddings)  # type: ignore[arg-type]

    @property
    def embedding_width(self) -> int:
        """Width of the token embedding; that of the hidden states but for a few models."""
        return int(self.embedding.embedding_dim)  # type: ignore[arg-type]

    @property
    def tied(self) -> bool:
        """Whether the output head's weight is the embedding's."""
        return bool(self.network.config.tie_word_embeddings) and self.head_path is not None

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the network can read, in tokens; None for no limit."""
        return max_positions(self.network)

    @property
    def vocab_size(self) -> int:
        """V, rows of the output head."""
        return int(text_config(self.network).vocab_size)

    @property
    def hidden_size(self) -> int:
        """D, width of the hidden states."""
        return int(text_config(self.network).hidden_size)

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.network.config.is_encoder_decoder)

    @property
    def layers(self) -> int:
        """Layers with attention or another mixer, one for each block."""
        return int(text_config(self.network).num_hidden_layers)

    @property
    def key_value_heads(self) -> int:
        """Heads of keys and values; fewer than those of queries where these are grouped."""
        return int(getattr(text_config(self.network), "num_key_value_heads", None) or self.attention_heads)

    @property
    def attention_heads(self) -> int:
        """Heads of queries."""
        return int(text_config(self.network).num_attention_heads)

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return int(getattr(text_config(self.network), "head_dim", None) or self.hidden_size // self.attention_heads)

    @property
    def architecture(self) -> str:
        """The model_type of config.json."""
        return str(self.network.config.model_type)

    @property
    def logit_scale(self) -> float:
        """The output head's results are multiplied by this (Cohere, Granite)."""
        config = text_config(self.network)
        return float(getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1))

    @property
    def logit_cap(self) -> float | None:
        """Logits are softly limited to this (Gemma 2); None for no limit."""
        cap: float | None = getattr(text_config(self.network), "final_logit_softcapping", None)
        return cap

    def accepts(self, argument: str) -> bool:
        """Whether the network's forward pass takes this keyword argument."""
        return argument in self._arguments

    @cached_property
    def _arguments(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.network.forward).parameters)

    @contextmanager
    def using(self, name: str | None) -> Iterator[Attachable | None]:
        """Inside, the adapter of this name answers and no other; None for the base alone.

        Raises ConfigError for a name that was not loaded.
        """
        if name is not None and name not in self.adapters:
            known = did_you_mean(name, self.adapters)
            raise ConfigError(f"no adapter was loaded as {name!r}{known} Loaded: {', '.join(self.adapters) or 'none'}.")
        chosen, before = None if name is None else self.adapters[name], list(self.attached)
        for adapter in before:
            adapter.detach()
        if chosen is not None:
            chosen.attach()
        try:
            yield chosen
        finally:
            if chosen is not None:
                chosen.detach()
            for adapter in before:
                adapter.attach()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the network is in eval mode; afterwards each module is in its own mode again."""
        training = [m for m in self.network.modules() if m.training]
        self.network.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
