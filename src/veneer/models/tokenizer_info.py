"""Facts about a tokenizer: chat template, stop tokens, begin-of-text tokens."""

from typing import Any

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endofturn|>", "<|end_of_turn|>", "<turn|>")
"""Tokens that end a turn in common chat templates; not every tokenizer declares its own as eos."""


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can render a list of messages."""
    return bool(getattr(tokenizer, "chat_template", None))


def eos_ids(tokenizer: Any, model_config: Any = None) -> set[int]:
    """Every token id at which generation stops.

    The tokenizer's eos, the config's eos_token_id (a number, a list or None), and the end-of-turn tokens of the chat
    template that are in the vocabulary. `model_config` is a transformers config or generation config.
    """
    ids = {tokenizer.eos_token_id}
    named = getattr(model_config, "eos_token_id", None)
    ids |= set(named) if isinstance(named, list | tuple) else {named}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary[token] for token in END_OF_TURN if token in template and token in vocabulary}
    return {int(i) for i in ids if i is not None}


def leading_ids(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer adds in front of a plain text: usually a begin-of-text token or none."""
    bare, full = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return list(full[:at])
    return []
