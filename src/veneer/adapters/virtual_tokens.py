"""Attach a prompt to a model: every attention sees its keys and values in front of those of the tokens.

While it is attached, a hook adds them to the attention context of each call of the transformer, and n to the positions.
Batches, packed documents and caches stay as they are.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters.part import NamedParameter, Part
from veneer.base.base import Base
from veneer.errors import DataError, ModelError, NotFoldable
from veneer.models.attention import AttentionContext, other_attention, use_veneer_attention
from veneer.prompts.base import PROMPTS, KeysValues, Prompt, PromptConfig, Shape

KEY = "prompt_embeddings"
PATH = "prompt"
"""Its parameters' path."""


class VirtualTokens(Part):
    """One prompt on one base."""

    folder = "prompt"

    def __init__(self, base: Base, config: PromptConfig, prompt: Prompt) -> None:
        super().__init__(base)
        self.config, self.prompt = config, prompt

    @property
    def kind(self) -> str:
        return self.config.kind

    def attach(self) -> None:
        self._hooks.append(self.base.decoder.register_forward_pre_hook(self._add, with_kwargs=True))

    def holders(self) -> Mapping[str, nn.Module]:
        return {PATH: self.prompt}

    def named(self) -> list[NamedParameter]:
        return [NamedParameter(PATH, n, self.prompt.roles[n], p, "prompt") for n, p in self.prompt.named_parameters()]

    def refuse_fold(self) -> None:
        raise NotFoldable("tokens in front of the text are no change of a weight, so they cannot be folded into one")

    def tensors(self) -> dict[str, Tensor]:
        return {KEY: self.prompt.table()}

    def peft_fields(self) -> dict[str, Any]:
        return {
            **type(self.prompt).to_peft(shape_of(self.base), self.config),
            "base_model_name_or_path": None,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
        }

    def facts(self) -> dict[str, Any]:
        return {"method": self.config.kind, "roles": dict(self.prompt.roles)}

    def _add(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        context = named.get("attention") or AttentionContext()
        if context.recorded is not None:  # the prompt itself is run
            return None
        tokens = inputs[0] if inputs else named.get("input_ids")
        count = (tokens if tokens is not None else named["inputs_embeds"]).shape[1]
        positions, cache = named.get("position_ids"), named.get("past_key_values")
        if positions is None:
            past = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(past, past + count, device=next(module.parameters()).device)[None]
        self._refuse_beyond(positions)
        front = self.prompt.keys_values(lambda x: keys_values_of(self.base, x))
        context = replace(context, virtual=front)
        return inputs, {**named, "position_ids": positions + self.config.tokens, **context.arguments()}

    def _refuse_beyond(self, positions: Tensor) -> None:
        """Raise DataError if the prompt moves tokens beyond the model's last position."""
        most = self.base.max_positions
        last = int(positions.max()) + self.config.tokens
        if most is not None and last >= most:
            raise DataError(
                f"with the {self.config.tokens} tokens of the {self.config.kind} in front, a text reaches position "
                f"{last}, but the model has {most}; shorten the text (in training: train.max_length)"
            )


def new_virtual_tokens(base: Base, config: PromptConfig, seed: int) -> VirtualTokens:
    """A new prompt for `base`, not attached.

    Raises ModelError for a model whose attention cannot be given virtual tokens.
    """
    network, embed = base.network, base.embedding
    kind, shape = PROMPTS[config.kind], shape_of(base)
    use_veneer_attention(network)
    device = next(network.parameters()).device
    rng = torch.Generator().manual_seed(seed)
    prompt = kind(shape, config, rng, lambda ids: embed(ids.to(device)), lambda x: keys_values_of(base, x))
    return VirtualTokens(base, config, prompt.to(device))


def config_of_prompt(fields: Mapping[str, Any]) -> PromptConfig | None:
    """Settings from an adapter_config.json; None if that file describes no prompt."""
    return next((c for name in PROMPTS if (c := PROMPTS[name].from_peft(fields)) is not None), None)


def shape_of(base: Base) -> Shape:
    """The sizes of the model that a prompt depends on; raises ModelError if the model cannot take virtual tokens."""
    what = "an encoder and a decoder" if base.is_encoder_decoder else other_attention(base.network)
    if what is not None:
        raise ModelError(
            f"{base.kind} has {what}; a prompt needs a causal language model with attention 'sdpa' "
            "(attn_implementation='sdpa' when it is loaded)"
        )
    return Shape(
        width=base.embedding_width,
        layers=base.layers,
        heads=base.key_value_heads,
        head_width=base.head_width,
        vocab_size=base.embedding_rows,
    )


def keys_values_of(base: Base, embeddings: Tensor) -> KeysValues:
    """The keys and values that each layer computes from embeddings (1, n, D) at positions 0 .. n - 1."""
    context = AttentionContext(recorded={})
    base.decoder(inputs_embeds=embeddings.to(base.dtype), use_cache=False, **context.arguments())
    recorded, layers = context.recorded or {}, base.layers
    if (absent := layers - len(recorded)) > 0:
        raise ModelError(
            f"{base.kind} cannot be given virtual tokens: {absent} of its {layers} layers have no "
            "attention, or the model does not pass keyword arguments on to it"
        )
    return [recorded[i] for i in range(layers)]
