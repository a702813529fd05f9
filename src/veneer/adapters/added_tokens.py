"""The tokens that an adapter adds to its base's vocabulary, and the tokenizer beside it that knows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.adapters.part import Part
from veneer.base.base import Base
from veneer.base.vocabulary import add_tokens, grow_vocabulary_, share_weight, token_ids
from veneer.errors import AdapterMismatch, ConfigError
from veneer.models.skeleton import load_tokenizer

Tokens = Sequence[int | str]
"""Ids, or tokens as text."""


@dataclass(frozen=True)
class Chosen:
    """The rows that a new adapter trains."""

    ids: dict[str, list[int]]
    """By module path."""
    fresh: list[int]
    """Ids of tokens that are new to the vocabulary."""


def add_and_choose(
    base: Base, new: Sequence[str], tokens: Tokens | Mapping[str, Tokens], whole: Sequence[str]
) -> Chosen:
    """Add `new` tokens to the base, and choose their rows and those of `tokens`.

    tokens    of the token embedding (and a head tied to it), or by name of embedding and head
    whole     paths of modules that are trained in full, so that their rows need no place of their own
    Raises ConfigError, with the base unchanged, for tokens that it does not have.
    """
    if new and base.tokenizer is None:
        raise ConfigError("new tokens need the base's tokenizer: give a Base that has one (load_model)")
    places = [str(base.embedding_path)]
    if base.head_path is not None and not share_weight(base):
        places.append(base.head_path)
    if isinstance(tokens, Mapping):
        by_path = {_place(name, places): token_ids(base.tokenizer, given) for name, given in tokens.items()}
    else:
        by_path = {places[0]: token_ids(base.tokenizer, tokens)} if tokens else {}
    for path, ids in by_path.items():
        if beyond := [i for i in ids if not 0 <= i < base.embedding_rows]:
            raise ConfigError(f"{path} has {base.embedding_rows} rows, so there is no token {beyond[0]} to train")
    added, fresh = [], []
    if new:
        known = base.tokenizer.get_vocab()
        added = add_tokens(base.tokenizer, new)
        fresh = [i for token, i in zip(new, added, strict=True) if token not in known]
        grow_vocabulary_(base, max(added) + 1)
    by_path = {path: [*by_path.get(path, []), *added] for path in places if path in by_path or added}
    return Chosen({path: ids for path, ids in by_path.items() if path not in whole}, fresh)


def _place(name: str, places: Sequence[str]) -> str:
    found = next((path for path in places if path == name or path.endswith(f".{name}")), None)
    if found is None:
        names = " and ".join(path.rpartition(".")[2] for path in places)
        raise ConfigError(f"{name!r} has no rows of tokens of its own; {names} of this model can have them")
    return found


@dataclass(frozen=True)
class AddedTokens:
    """What a loaded adapter adds to the vocabulary."""

    tokens: list[Any]
    """transformers' AddedToken, in the order of their ids."""
    rows: int
    """Of the token embedding, at least."""

    def give_(self, base: Base) -> None:
        """Add them to the base; does nothing where it has them."""
        if base.tokenizer is not None:
            add_tokens(base.tokenizer, self.tokens)
        grow_vocabulary_(base, self.rows)


def read_added_tokens(base: Base, folder: Path, parts: Sequence[Part]) -> AddedTokens | None:
    """The tokens that the tokenizer in an adapter's folder has and the base lacks; None if no part has rows of tokens.

    Raises AdapterMismatch where that tokenizer does not go on from the base's, or is missing.
    """
    needed = max((part.vocabulary for part in parts), default=0)
    if not needed:
        return None
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        if needed > base.embedding_rows:
            raise AdapterMismatch(
                f"adapter {folder} has rows for {needed} tokens, this {base.kind} for {base.embedding_rows}, and there "
                "is no tokenizer in the folder that says what the others are; copy its tokenizer files there"
            )
        return None
    theirs = load_tokenizer(folder)
    held = max(len(n.parameter) for part in parts if part.vocabulary for n in part.named())
    if needed > max(base.embedding_rows, len(theirs)) + held:
        raise AdapterMismatch(
            f"adapter {folder} trains token {needed - 1}, but its tokenizer has {len(theirs)} tokens and this "
            f"{base.kind} has rows for {base.embedding_rows}; copy the folder again"
        )
    if base.tokenizer is None:
        return AddedTokens([], needed)
    own, vocabulary = base.tokenizer.get_vocab(), theirs.get_vocab()
    differing = [token for token, i in own.items() if vocabulary.get(token) != i]
    new = sorted((i, token) for token, i in vocabulary.items() if token not in own)
    if differing or [i for i, _ in new] != list(range(len(base.tokenizer), len(base.tokenizer) + len(new))):
        token = differing[0] if differing else new[0][1]
        raise AdapterMismatch(
            f"the tokenizer in {folder} does not go on from the base's: token {token!r} is {vocabulary.get(token)} "
            f"there and {own.get(token)} here ({len(differing)} tokens differ). Nothing was loaded"
        )
    return AddedTokens([theirs.added_tokens_decoder.get(i, token) for i, token in new], needed)
