"""Tokens to text while they come, never showing half a character."""

from typing import Any

INCOMPLETE = "\ufffd"
"""What a decoder writes for bytes that are no whole character yet."""


class StreamDecoder:
    """Decodes one row's tokens as they come.

    Only a window of the last tokens is decoded at each step: from the last whole piece shown, which also gives
    tokenizers that put a space in front of a word the context they need.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start, self._shown = 0, 0

    def feed(self, token: int) -> str:
        """The text that has become certain with this token; may be empty."""
        self._tokens.append(token)
        new = self._new()
        if not new or new.endswith(INCOMPLETE):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return new

    def rest(self) -> str:
        """What is left at the end: bytes that never became a character, as the decoder writes them."""
        new = self._new()
        self._start = self._shown = len(self._tokens)
        return new

    def _new(self) -> str:
        before = self._decode(self._tokens[self._start : self._shown])
        return self._decode(self._tokens[self._start :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
