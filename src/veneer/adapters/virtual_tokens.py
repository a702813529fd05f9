"""Attach a prompt to a model: every attention sees its keys and values in front of those of the tokens.

While it is attached, a hook adds them to the attention context of each call of the transformer, and n to the positions.
Batches, packed documents and caches stay as they are.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from veneer.adapters.adapter import Change, Named
from veneer.adapters.serialization import FORMAT, base_facts, other_base, refuse_newer
from veneer.disk.adapter_dir import AdapterFiles, read_adapter, write_adapter
from veneer.errors import AdapterMismatch, DataError, ModelError
from veneer.models.attention import AttentionContext, other_attention, use_veneer_attention
from veneer.prompts.base import PROMPTS, KeysValues, Prompt, PromptConfig, Shape

KEY = "prompt_embeddings"
PATH = "prompt"
"""Its parameters' path."""


class Prompted(Change):
    """One prompt on one model."""

    def __init__(self, model: Any, config: PromptConfig, prompt: Prompt, base: str = "") -> None:
        self.model, self.config, self.prompt, self.base = model, config, prompt, base
        self._hook: RemovableHandle | None = None
        self._frozen: list[nn.Parameter] = []

    @property
    def kind(self) -> str:
        return self.config.kind

    @property
    def attached(self) -> bool:
        """Whether the model's outputs are changed by this prompt now."""
        return self._hook is not None

    def attach(self) -> "Prompted":
        """Put the prompt before every sequence and freeze the base; does nothing if attached."""
        if not self.attached:
            self._frozen = [p for p in self.model.parameters() if p.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(False)
            self._hook = _transformer(self.model).register_forward_pre_hook(self._add, with_kwargs=True)
        return self

    def detach(self) -> "Prompted":
        """Take the prompt off again and restore which parameters of the base are trained."""
        if self._hook is not None:
            self._hook.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._hook, self._frozen = None, []
        return self

    def holders(self) -> Mapping[str, nn.Module]:
        return {PATH: self.prompt}

    def named(self) -> list[Named]:
        return [Named(PATH, n, self.prompt.roles[n], p, "prompt") for n, p in self.prompt.named_parameters()]

    def files(self, facts: Mapping[str, Any] | None = None) -> AdapterFiles:
        """The folder that `save` writes, as plain data."""
        config = {
            **type(self.prompt).to_peft(shape_of(self.model), self.config),
            "base_model_name_or_path": self.base or None,
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
        }
        own = {
            "format": FORMAT,
            "method": self.config.kind,
            "roles": dict(self.prompt.roles),
            "base": base_facts(self.model, self.base),
        }
        return AdapterFiles(config, {KEY: self.prompt.table()}, {**own, **(facts or {})})

    def save(self, folder: str | Path, facts: Mapping[str, Any] | None = None) -> int:
        return write_adapter(Path(folder), self.files(facts))

    def _add(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        context = named.get("attention") or AttentionContext()
        if context.recorded is not None:  # the prompt itself is run
            return None
        tokens = inputs[0] if inputs else named.get("input_ids")
        count = (tokens if tokens is not None else named["inputs_embeds"]).shape[1]
        positions, cache = named.get("position_ids"), named.get("past_key_values")
        if positions is None:
            past = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(past, past + count, device=_device(module))[None]
        self._refuse_beyond(positions)
        front = self.prompt.keys_values(lambda x: keys_values_of(self.model, x))
        context = replace(context, virtual=front)
        return inputs, {**named, "position_ids": positions + self.config.tokens, **context.arguments()}

    def _refuse_beyond(self, positions: Tensor) -> None:
        """Raise DataError if the prompt moves tokens beyond the model's last position."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        last = int(positions.max()) + self.config.tokens
        if most is not None and last >= most:
            raise DataError(
                f"with the {self.config.tokens} tokens of the {self.config.kind} in front, a text reaches position "
                f"{last}, but the model has {most}; shorten the text (in training: train.max_length)"
            )


def attach_prompt(model: Any, config: PromptConfig, *, seed: int = 0, base: str = "") -> Prompted:
    """Put a new prompt before every sequence of `model` and freeze the rest.

    base    the name by which others find the base model; written into the adapter's folder
    Raises ModelError, with the model unchanged, for a model whose attention cannot be given virtual tokens.
    """
    kind, shape = PROMPTS[config.kind], shape_of(model)
    use_veneer_attention(model)
    embed, device = model.get_input_embeddings(), _device(model)
    prompt = kind(
        shape,
        config,
        torch.Generator().manual_seed(seed),
        lambda ids: embed(ids.to(device)),
        lambda x: keys_values_of(model, x),
    )
    return Prompted(model, config, prompt.to(device), base).attach()


def load_prompt(model: Any, folder: str | Path, *, allow_other_base: bool = False) -> Prompted:
    """Read a folder with a prompt (ours or PEFT's) and attach it; raises AdapterMismatch, the model unchanged."""
    files = read_adapter(Path(folder))
    config = config_of_prompt(files.config)
    if config is None or set(files.tensors) != {KEY}:
        raise AdapterMismatch(
            f"{folder} holds no prompt: peft_type {files.config.get('peft_type')!r} with {', '.join(files.tensors)}; "
            f"wanted is one tensor {KEY} of a {' or '.join(PROMPTS)}"
        )
    refuse_newer(files, str(folder))
    if problems := other_base(model, files, allow_other_base):
        raise AdapterMismatch(f"prompt {folder} does not fit this {type(model).__name__}:\n{problems[0]}")
    prompted = attach_prompt(model, config, base=str(files.config.get("base_model_name_or_path") or ""))
    try:
        prompted.prompt.load_(files.tensors[KEY])
    except AdapterMismatch as error:
        prompted.detach()
        raise AdapterMismatch(f"{folder}: {error}") from error
    return prompted


def _transformer(model: Any) -> nn.Module:
    """The module that embeds tokens and runs the blocks: the base model, or the decoder in it that is called (OPT)."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model  # ModernBERT's `decoder` is its head


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def config_of_prompt(fields: Mapping[str, Any]) -> PromptConfig | None:
    """Settings from an adapter_config.json; None if that file describes no prompt."""
    return next((c for name in PROMPTS if (c := PROMPTS[name].from_peft(fields)) is not None), None)


def shape_of(model: Any) -> Shape:
    """The sizes of the model that a prompt depends on; raises ModelError if the model cannot take virtual tokens."""
    what = "an encoder and a decoder" if model.config.is_encoder_decoder else other_attention(model)
    if what is not None:
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
        vocab_size=embedding.num_embeddings,
    )


def keys_values_of(model: Any, embeddings: Tensor) -> KeysValues:
    """The keys and values that each layer computes from embeddings (1, n, D) at positions 0 .. n - 1."""
    context = AttentionContext(recorded={})
    _transformer(model)(inputs_embeds=embeddings.to(model.dtype), use_cache=False, **context.arguments())
    recorded, layers = context.recorded or {}, model.config.get_text_config().num_hidden_layers
    if (absent := layers - len(recorded)) > 0:
        raise ModelError(
            f"{type(model).__name__} cannot be given virtual tokens: {absent} of its {layers} layers have no "
            "attention, or the model does not pass keyword arguments on to it"
        )
    return [recorded[i] for i in range(layers)]
