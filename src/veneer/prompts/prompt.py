"""Prompt tuning: learn the embeddings of n virtual tokens in front of the text.

    keys and values of every layer = the frozen model's own, on P    P: (n, D)

Source: Lester et al. 2021, arXiv:2104.08691; it starts from the embeddings of words drawn from the vocabulary's most
common ones, which is the paper's "sampled vocabulary".  P passes through the model once per forward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from veneer.prompts.base import PROMPTS, Embed, KeysValues, Prompt, PromptConfig, Run, Shape, some_words


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(PromptConfig):
    """Settings of prompt tuning."""

    kind: ClassVar[str] = "prompt"


@PROMPTS.add("prompt")
class PromptTuning(Prompt):
    """One parameter, embeddings (n, D)."""

    Config = PromptTuningConfig
    peft_type = "PROMPT_TUNING"
    roles: ClassVar[Mapping[str, Literal["full"]]] = {"embeddings": "full"}

    def __init__(self, shape: Shape, config: PromptTuningConfig, rng: torch.Generator, embed: Embed, run: Run) -> None:
        super().__init__(shape, config, rng, embed, run)
        with torch.no_grad():
            self.embeddings = nn.Parameter(embed(some_words(shape, config.tokens, rng))[0].float().clone())

    def keys_values(self, run: Run) -> KeysValues:
        return run(self.embeddings[None])

    @classmethod
    def n_params(cls, shape: Shape, config: PromptTuningConfig) -> int:
        """n D."""
        return config.tokens * shape.width

    def table(self) -> nn.Parameter:
        return self.embeddings

    @classmethod
    def to_peft(cls, shape: Shape, config: PromptTuningConfig) -> dict[str, Any]:
        return super().to_peft(shape, config) | {"prompt_tuning_init": "RANDOM"}
