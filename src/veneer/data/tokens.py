"""Text to token ids with character offsets, so that what is trained is known by position and never searched for."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from veneer.errors import ModelError

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Tokenized:
    """Token ids of one text; token k covers the characters starts[k] <= c < ends[k]. Tokens that are bytes of one
    character all cover it."""

    ids: Ints
    starts: Ints
    ends: Ints

    def within(self, start: int, end: int) -> slice:
        """The tokens that cover any character of [start, end)."""
        hit = np.flatnonzero((self.starts < end) & (np.maximum(self.ends, self.starts + 1) > start))
        return slice(int(hit[0]), int(hit[-1]) + 1) if len(hit) else slice(0, 0)


class Encoder:
    """A fast tokenizer with its offsets: no truncation, no padding, no special tokens of its own.

    A text is tokenized in pieces that begin where the model begins to write, so that the tokens in front of a
    completion are exactly those of the prompt alone. Tokenizers that put a space before every text (SentencePiece)
    cannot be used in pieces; there a token that reaches over the edge counts as written.
    """

    def __init__(self, tokenizer: Any) -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"the tokenizer {type(tokenizer).__name__} has no fast version, so characters cannot be traced to its "
                "tokens; use a model with a tokenizer.json"
            )
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.post_processor = None  # some trim spaces off the offsets
        twice = self._backend.encode("x", add_special_tokens=False).ids * 2
        self.in_pieces = self._backend.decode(twice, skip_special_tokens=False) == "xx"

    def encode(self, texts: Sequence[str], edges: Sequence[Sequence[int]]) -> list[Tokenized]:
        """Tokenize each text, in pieces that begin at its `edges` (rising character positions)."""
        bounds = [sorted({0, len(t), *(at if self.in_pieces else ())}) for t, at in zip(texts, edges, strict=True)]
        pieces = [text[a:b] for text, cuts in zip(texts, bounds, strict=True) for a, b in pairwise(cuts)]
        encoded = iter(self._backend.encode_batch(pieces, add_special_tokens=False))
        result = []
        for cuts in bounds:
            parts = [(next(encoded), begin) for begin in cuts[:-1]]
            ids = np.array([i for part, _ in parts for i in part.ids], dtype=np.int32)
            offsets = [np.array(part.offsets, dtype=np.int32).reshape(-1, 2) + begin for part, begin in parts]
            both = np.concatenate(offsets) if offsets else np.empty((0, 2), dtype=np.int32)
            result.append(Tokenized(ids, both[:, 0], both[:, 1]))
        return result
