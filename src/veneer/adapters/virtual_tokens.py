"""A prompt on a model: its keys and values are put before those of the tokens, in every attention.

While attached, the model's attention function is one that takes them from `virtual`, which a hook adds to each call of
the transformer together with positions that begin n later. Batches, packed documents and caches stay as they are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from veneer.adapters.part import NamedParameter, Part
from veneer.base.base import Base
from veneer.errors import DataError, ModelError, NotFoldable
from veneer.prompts.base import PROMPTS, KeysValues, Prompt, PromptConfig, Shape

NAME = "veneer_prompted"
KEY = "prompt_embeddings"
PATH = "prompt"
"""Where its parameters are said to be."""


class VirtualTokens(Part):
    """One prompt on one base."""

    folder = "prompt"

    def __init__(self, base: Base, config: PromptConfig, prompt: Prompt) -> None:
        self.base, self.config, self.prompt = base, config, prompt
        self._hook: RemovableHandle | None = None
        self._before = ""
        self._running = False

    @property
    def kind(self) -> str:
        return self.config.kind

    @property
    def attached(self) -> bool:
        return self._hook is not None

    def attach(self) -> None:
        network = self.base.network
        self._before = str(network.config._attn_implementation)
        self._hook = self.base.transformer.register_forward_pre_hook(self._add, with_kwargs=True)
        network.config._attn_implementation = NAME

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self.base.network.config._attn_implementation = self._before
        self._hook = None

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
            **type(self.prompt).to_peft(shape_of(self.base.network), self.config),
            "base_model_name_or_path": None,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
        }

    def facts(self) -> dict[str, Any]:
        return {"method": self.config.kind, "roles": dict(self.prompt.roles)}

    def _add(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self._running:
            return None
        tokens = inputs[0] if inputs else named.get("input_ids")
        count = (tokens if tokens is not None else named["inputs_embeds"]).shape[1]
        positions, cache = named.get("position_ids"), named.get("past_key_values")
        if positions is None:
            past = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(past, past + count, device=next(module.parameters()).device)[None]
        self._refuse_beyond(positions)
        front = self.prompt.keys_values(lambda x: self._run(module, x))
        return inputs, {**named, "position_ids": positions + self.config.tokens, "virtual": front}

    def _refuse_beyond(self, positions: Tensor) -> None:
        """Raise DataError where tokens would stand, n places later, beyond the last position that the model has."""
        most = self.base.max_positions
        last = int(positions.max()) + self.config.tokens
        if most is not None and last >= most:
            raise DataError(
                f"with the {self.config.tokens} tokens of the {self.config.kind} in front, a text reaches position "
                f"{last}, but the model has {most}; shorten the text (in training: train.max_length)"
            )

    def _run(self, module: nn.Module, embeddings: Tensor) -> KeysValues:
        self._running = True
        try:
            return given_to_attention(self.base.network, module, embeddings)
        finally:
            self._running = False


def new_virtual_tokens(base: Base, config: PromptConfig, seed: int) -> VirtualTokens:
    """A new prompt for `base`, not attached.

    Raises ModelError for a model whose attention cannot be given virtual tokens.
    """
    kind, shape, embed = PROMPTS[config.kind], shape_of(base.network), base.embedding

    def run(x: Tensor) -> KeysValues:
        return given_to_attention(base.network, base.transformer, x)

    device = next(base.network.parameters()).device
    prompt = kind(shape, config, torch.Generator().manual_seed(seed), lambda ids: embed(ids.to(device)), run)
    return VirtualTokens(base, config, prompt.to(device))


def config_of_prompt(fields: Mapping[str, Any]) -> PromptConfig | None:
    """Settings from an adapter_config.json; None if that file describes no prompt."""
    return next((c for name in PROMPTS if (c := PROMPTS[name].from_peft(fields)) is not None), None)


def shape_of(model: Any) -> Shape:
    """What a prompt may know of the model; raises ModelError where virtual tokens cannot be put before its tokens."""
    own = model.config._attn_implementation
    if model.config.is_encoder_decoder or own not in ("sdpa", NAME):
        what = "an encoder and a decoder" if model.config.is_encoder_decoder else f"attention {own!r}"
        raise ModelError(
            f"{type(model).__name__} has {what}; a prompt needs a causal language model with attention 'sdpa' "
            "(attn_implementation='sdpa' when it is loaded)"
        )
    config = model.config.get_text_config()
    queries, embedding = config.num_attention_heads, model.get_input_embeddings()
    return Shape(
        width=embedding.embedding_dim,
        layers=config.num_hidden_layers,
        heads=getattr(config, "num_key_value_heads", None) or queries,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // queries,
        words=embedding.num_embeddings,
    )


def given_to_attention(model: Any, transformer: Any, embeddings: Tensor) -> KeysValues:
    """What every layer's attention is given as keys and values for embeddings (1, n, D) at positions 0 .. n - 1."""
    before, recorded = model.config._attn_implementation, dict[int, tuple[Tensor, Tensor]]()
    model.config._attn_implementation = NAME
    try:
        transformer(inputs_embeds=embeddings.to(model.dtype), use_cache=False, recorded=recorded)
    finally:
        model.config._attn_implementation = before
    return [recorded[i] for i in sorted(recorded)]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface, with `virtual` keys and values that every query sees besides its own."""
    recorded, virtual = others.pop("recorded", None), others.pop("virtual", None)
    if (recorded is None) == (virtual is None) or others.get("softcap") is not None:
        raise ModelError(
            f"{type(module).__name__} cannot be given virtual tokens: the model does not pass them on to its attention"
        )
    if recorded is not None:
        recorded[module.layer_idx] = (key, value)
    else:
        t, past = query.shape[2], key.shape[2] - query.shape[2]
        front_keys, front_values = (x.to(key.dtype).expand(len(key), -1, -1, -1) for x in virtual[module.layer_idx])
        if attention_mask is None and t > 1:
            attention_mask = torch.ones(t, past + t, dtype=torch.bool, device=key.device).tril(past)[None, None]
        if attention_mask is not None:
            front = front_keys.shape[2]
            open_ = True if attention_mask.dtype == torch.bool else 0.0
            attention_mask = nn.functional.pad(attention_mask, (front, 0), value=open_)
        key, value = torch.cat([front_keys, key], dim=2), torch.cat([front_values, value], dim=2)
    is_causal = attention_mask is None and query.shape[2] > 1
    others.pop("is_causal", None)
    out: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, is_causal=is_causal, **others
    )
    return out


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
