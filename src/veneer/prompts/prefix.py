"""Prefix tuning: learn the keys and values of n virtual tokens, on every layer by themselves.

    keys_l, values_l: (heads, n, E)    for each of L layers; heads of keys and values, also where queries are grouped

Source: Li and Liang 2021, arXiv:2101.00190; it starts from what the model makes of common words, as the paper advises.
Departs from it: the table is trained itself, without the network that makes it during training in the paper.
Keys are taken as attention meets them: no rotary position is put on them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from veneer.prompts.base import PROMPTS, Embed, KeysValues, Prompt, PromptConfig, Run, Shape, some_words


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(PromptConfig):
    """Settings of prefix tuning."""

    kind: ClassVar[str] = "prefix"


@PROMPTS.add("prefix")
class PrefixTuning(Prompt):
    """One parameter, prefixes (n, L * 2 * heads * E): a token's keys and values of layer 0, of layer 1, ..."""

    Config = PrefixTuningConfig
    peft_type = "PREFIX_TUNING"
    roles: ClassVar[Mapping[str, Literal["full"]]] = {"prefixes": "full"}

    def __init__(self, shape: Shape, config: PrefixTuningConfig, rng: torch.Generator, embed: Embed, run: Run) -> None:
        super().__init__(shape, config, rng, embed, run)
        self.shape = shape
        with torch.no_grad():
            pairs = run(embed(some_words(shape, config.tokens, rng)))
            flat = [t[0].transpose(0, 1).flatten(1) for pair in pairs for t in pair]
            self.prefixes = nn.Parameter(torch.cat(flat, dim=1).float())

    def keys_values(self, run: Run) -> KeysValues:
        s = self.shape
        parts = self.prefixes.view(-1, 2 * s.layers, s.heads, s.head_width).permute(1, 2, 0, 3)[:, None]
        return [(parts[2 * i], parts[2 * i + 1]) for i in range(s.layers)]

    @classmethod
    def n_params(cls, shape: Shape, config: PrefixTuningConfig) -> int:
        """n L 2 heads E."""
        return config.tokens * 2 * shape.layers * shape.heads * shape.head_width

    def table(self) -> nn.Parameter:
        return self.prefixes

    @classmethod
    def to_peft(cls, shape: Shape, config: PrefixTuningConfig) -> dict[str, Any]:
        """A folder that was trained with a projection is read too: it holds the table that the projection made."""
        own = {"token_dim": shape.heads * shape.head_width, "encoder_hidden_size": shape.width}
        return super().to_peft(shape, config) | own | {"prefix_projection": False}
