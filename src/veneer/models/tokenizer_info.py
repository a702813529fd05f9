"""Small questions about a tokenizer that several rooms ask."""

from typing import Any

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|endofturn|>", "<|end_of_turn|>", "<turn|>")
"""Tokens that close a turn in the chat templates in use; not every tokenizer names its own as eos."""


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can render a list of messages."""
    return bool(getattr(tokenizer, "chat_template", None))


def eos_ids(tokenizer: Any, model_config: Any = None) -> set[int]:
    """Every token id at which generation stops.

    The tokenizer's eos, the config's eos_token_id (a number, a list or none), and the end-of-turn token that the chat
    template writes, if the vocabulary has it. `model_config` is a transformers config or generation config.
    """
    ids = {tokenizer.eos_token_id}
    named = getattr(model_config, "eos_token_id", None)
    ids |= set(named) if isinstance(named, list | tuple) else {named}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary[token] for token in END_OF_TURN if token in template and token in vocabulary}
    return {int(i) for i in ids if i is not None}


def leading_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts in front of a plain text, usually a begin-of-text token or nothing."""
    bare, full = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
    for at in range(len(full) - len(bare) + 1):
        if full[at : at + len(bare)] == bare:
            return list(full[:at])
    return []
