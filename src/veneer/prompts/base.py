"""What a prompt is: trained virtual tokens in front of every sequence, and the registry of all kinds.

Later tokens meet earlier ones only in attention, as keys and values. So whatever stands in front is, to the model, one
pair of keys and values per layer; nothing else of a forward pass changes but that positions begin after it. Batches
stay as long as they were, packed documents each see the same front, and a cache holds real tokens only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.errors import AdapterMismatch, ConfigError
from veneer.registry import Registry
from veneer.settings import typed

KeysValues = list[tuple[Tensor, Tensor]]
"""One pair per layer, each (1, heads, n, E) in the model's compute dtype, as attention takes them (rotated already)."""
Embed = Callable[[Tensor], Tensor]
"""Token ids -> their embeddings."""
Run = Callable[[Tensor], KeysValues]
"""Runs the model on embeddings (1, n, D) at positions 0 .. n - 1 and returns what attention was given."""

COMMON = 5000
"""Words are drawn from so many first ones of the vocabulary, which are the frequent ones of most tokenizers."""


@dataclass(frozen=True)
class Shape:
    """What a prompt may know of the model."""

    width: int
    """D, of the token embeddings."""
    layers: int
    heads: int
    """Of keys and values; fewer than of queries where these are grouped."""
    head_width: int
    """E."""
    vocab_size: int
    """V."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Settings of one kind of prompt; subclasses add typed fields with unit and range below each."""

    kind: ClassVar[str]
    tokens: int = 20
    """n, virtual tokens in front of every sequence, at least 1."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ConfigError(f"{self.kind}.tokens must be at least 1, got {self.tokens}")


class Prompt(nn.Module, ABC):
    """Trained virtual tokens."""

    Config: ClassVar[type[PromptConfig]]
    peft_type: ClassVar[str]
    roles: ClassVar[Mapping[str, Literal["full"]]]
    """Every parameter's role, as methods state theirs."""

    @abstractmethod
    def __init__(self, shape: Shape, config: Any, rng: torch.Generator, embed: Embed, run: Run) -> None:
        """Build the prompt.  Parameters are float32."""
        super().__init__()

    @abstractmethod
    def keys_values(self, run: Run) -> KeysValues:
        """What every sequence's attention meets first, with gradient."""

    @classmethod
    @abstractmethod
    def n_params(cls, shape: Shape, config: Any) -> int:
        """Trained numbers, in closed form."""

    @abstractmethod
    def table(self) -> nn.Parameter:
        """The one tensor (n, ...) that is saved, as PEFT's `prompt_embeddings`."""

    @torch.no_grad()
    def load_(self, table: Tensor) -> None:
        """Take a saved table in place; raises AdapterMismatch for another shape or numbers that are not finite."""
        own = self.table()
        if table.shape != own.shape:
            raise AdapterMismatch(
                f"prompt_embeddings: adapter has {tuple(table.shape)}, model needs {tuple(own.shape)}"
            )
        if not bool(table.float().isfinite().all()):
            raise AdapterMismatch("prompt_embeddings: holds numbers that are infinite or not a number")
        own.copy_(table)

    @classmethod
    def to_peft(cls, shape: Shape, config: Any) -> dict[str, Any]:
        """The kind's own fields of adapter_config.json, `peft_type` among them."""
        return {
            "peft_type": cls.peft_type,
            "num_virtual_tokens": config.tokens,
            "token_dim": shape.width,
            "num_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_transformer_submodules": 1,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> PromptConfig | None:
        """Settings from an adapter_config.json; None if that file describes another kind."""
        return cls.Config(tokens=fields["num_virtual_tokens"]) if fields.get("peft_type") == cls.peft_type else None


PROMPTS: Registry[type[Prompt]] = Registry("prompt")


def config_from(prompt: str, settings: Mapping[str, Any]) -> PromptConfig:
    """Typed settings of `prompt`; raises ConfigError for a field it does not have, with close matches."""
    return typed("prompt", prompt, PROMPTS[prompt].Config, settings)


def some_words(shape: Shape, n: int, rng: torch.Generator) -> Tensor:
    """n ids (1, n) of frequent words."""
    return torch.randint(0, min(COMMON, shape.vocab_size), (1, n), generator=rng)
