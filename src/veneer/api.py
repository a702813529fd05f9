"""veneer from Python, on one page: what a notebook needs.

    base = vn.load_model("smollm2-135m-instruct", storage="nf4")
    adapter = vn.attach(base, vn.LoRAConfig(rank=16, alpha=32))
    run = vn.train(base, adapter, data="train.jsonl", lr=1e-3)
    print(vn.evaluate(base, "test.jsonl").metrics)
    print(base.generate("Who is in Rome?"))
    adapter.merge("models/sql")

`Model` and `Adapter` are the library's Base and adapter with the verbs of rooms that these may not import.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.adapters import adapter as adapters
from veneer.adapters import attach as attaching
from veneer.adapters.added_tokens import Tokens
from veneer.adapters.targets import Targeting
from veneer.base import load
from veneer.base.base import Base
from veneer.base.device import Device
from veneer.base.storage_config import BaseStorage
from veneer.data.prompt_format import PlainText, form_of
from veneer.generate.engine import generate
from veneer.generate.streaming import encode, sampler_of, speak
from veneer.merge.verified_merge import Merged, merge_and_verify, verification_prompts
from veneer.methods.base import MethodConfig
from veneer.models.tokenizer_info import has_chat_template
from veneer.prompts.base import PromptConfig


class Model(Base):
    """A base model that writes text, alone or with the adapters attached to it."""

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[str] = (),
        format: str | None = None,  # noqa: A002
        show: Callable[[str], object] = lambda piece: None,
    ) -> str:
        """The answer to a prompt, or to the messages of a conversation.

        temperature   0 for the likeliest text; above 0 draws with `seed`
        stop          texts before which the answer ends
        format        "chat", "plain" or "raw"; by default as the rows of the attached adapter were, else a chat where
                      the tokenizer has a template
        show          is called with each piece of text as soon as it is certain
        Raises ConfigError, DataError and ModelError as encoding and generating do.
        """
        sampler = sampler_of(temperature, top_p, top_k, seed)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        tokens = encode(self.tokenizer, messages, plain=self._form(format))
        return speak(self, tokens, max_new_tokens=max_tokens, sampler=sampler, show=show, stop=stop).text

    def generate_many(self, prompts: Sequence[str], *, max_tokens: int = 256, format: str | None = None) -> list[str]:  # noqa: A002
        """The likeliest answer to each prompt, computed in batches."""
        form = self._form(format)
        asked = [encode(self.tokenizer, [{"role": "user", "content": p}], plain=form) for p in prompts]
        written = generate(self, asked, max_new_tokens=max_tokens)
        return [str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip() for tokens in written]

    def _form(self, asked: str | None) -> PlainText | None:
        facts = self.attached[-1].facts if self.attached else {}
        if asked is None and not facts and not has_chat_template(self.tokenizer):
            asked = "raw"
        return form_of(facts, asked)


class Adapter(adapters.Adapter):
    """An adapter that can be merged into its base."""

    def merge(
        self,
        into: str | Path,
        *,
        dtype: torch.dtype | None = None,
        data: str | None = None,
        rows: int = 50,
        say: Callable[[str], None] = lambda text: None,
    ) -> Merged:
        """Write the base with this adapter folded in as a model folder, and compare both on real rows.

        dtype   of the written weights; None keeps the base's own
        data    rows to verify on; by default those it was trained with, else built-in texts
        The comparison is exact to rounding only where the base computes in float32.
        Raises Refused if the merged model says something else, NotFoldable for what is no change of weights.
        """
        prompts = verification_prompts(self.base, self.facts, data, rows=rows, say=say)
        return merge_and_verify(self.base, self, Path(into), prompts, dtype=dtype, say=say)


def load_model(
    name: str | Path,
    *,
    storage: str | Mapping[str, Any] | BaseStorage | None = "dense",
    device: str | torch.device | Device = "auto",
    dtype: str | torch.dtype = "auto",
    paged: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Model:
    """Load a base model; the arguments and errors are those of veneer.base.load.load_model."""
    base = load.load_model(name, storage=storage, device=device, dtype=dtype, paged=paged, say=say)
    return Model(**{f.name: getattr(base, f.name) for f in fields(base)})


def attach(
    base: Base | nn.Module,
    config: MethodConfig | PromptConfig,
    targets: Targeting | str | tuple[str, ...] | None = None,
    *,
    prompt: PromptConfig | None = None,
    trained_modules: Sequence[str] = (),
    new_tokens: Sequence[str] = (),
    trained_tokens: Tokens | Mapping[str, Tokens] = (),
    seed: int = 0,
) -> Adapter:
    """Attach a new adapter to a base, or to any torch module, and freeze the rest.

    config            of a method (LoRAConfig(rank=16)), or of virtual tokens
    targets           "all-linear", a regular expression for whole module paths, path endings, or a Targeting; None:
                      those of the config, else all linear layers
    prompt            virtual tokens in front of the text, beside a method
    trained_modules   path endings of modules that are trained in full beside a method, like lm_head
    new_tokens        texts that become tokens: the base's vocabulary grows, and their rows are trained
    trained_tokens    known tokens, as text or ids, whose rows are trained; by module, if not in the embedding alone
    Raises TargetError, ConfigError or ModelError, before anything is changed, for what does not fit.
    """
    if isinstance(config, PromptConfig):
        return _ours(attaching.attach(base, None, prompt=config, seed=seed, kind=Adapter))
    made = attaching.attach(
        base,
        config,
        targets,
        prompt=prompt,
        trained_modules=trained_modules,
        new_tokens=new_tokens,
        trained_tokens=trained_tokens,
        seed=seed,
        kind=Adapter,
    )
    return _ours(made)


def load_adapter(
    base: Base | nn.Module,
    folder: str | Path,
    *,
    name: str | None = None,
    allow_other_base: bool = False,
    allow_no_effect: bool = False,
) -> Adapter:
    """Read an adapter folder, PEFT's too, and attach it; arguments and errors as veneer.adapters.attach.load_adapter.

    name    keep it detached under this name, for `with base.using(name)`
    """
    adapter = attaching.load_adapter(
        base, folder, name=name, allow_other_base=allow_other_base, allow_no_effect=allow_no_effect, kind=Adapter
    )
    return _ours(adapter)


def _ours(adapter: adapters.Adapter) -> Adapter:
    assert isinstance(adapter, Adapter)
    return adapter
