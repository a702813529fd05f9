"""One example: token ids, and for each whether the model is trained to write it; and how one too long is shortened."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from veneer.data.tokens import Ints

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Example:
    """What is fed to the model for one row (or one piece of a running text)."""

    tokens: Ints
    """(T,) int32."""
    supervised: Mask
    """(T,); True where the token is a trained target. Never True at 0, which nothing comes before."""
    source: str
    line: int

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TooLong:
    """A row that was dropped for its length."""

    length: int
    """Tokens it would have had."""
    source: str
    line: int


@dataclass(frozen=True)
class Made:
    """What one row became."""

    pieces: list[Example]
    truncated: bool = False
    split: bool = False


def supervise(length: int, spans: list[slice]) -> Mask:
    """(T,), True inside the spans; the first token is never a target."""
    mask = np.zeros(length, dtype=np.bool_)
    for span in spans:
        mask[span] = True
    mask[:1] = False
    return mask


def split(ids: Ints, most: int) -> list[tuple[Ints, Mask]]:
    """Running text in pieces of at most `most` >= 2 tokens, all of it trained.

    Neighbors share one token, so that every token but the very first is a target exactly once.
    """
    begins = range(0, max(len(ids) - 1, 1), most - 1)
    pieces = [ids[begin : begin + most] for begin in begins]
    return [(piece, supervise(len(piece), [slice(0, len(piece))])) for piece in pieces]


def truncate(ids: Ints, spans: list[slice], most: int, bos: int | None) -> tuple[Ints, Mask] | None:
    """The last `most` tokens, behind the begin-of-text token if there was one; None if that would cut the last span.

    An earlier span that loses its beginning is read but no longer trained.
    """
    first = ids[: int(len(ids) > 0 and int(ids[0]) == bos)]
    cut = len(ids) - most + len(first)
    if cut >= spans[-1].start:
        return None
    shift = len(first) - cut
    kept = [slice(span.start + shift, span.stop + shift) for span in spans if span.start > cut]
    return np.concatenate([first, ids[cut:]]), supervise(most, kept)
