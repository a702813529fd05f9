"""Add tokens to a base: to its tokenizer, and rows to its token embedding and output head.

New rows start at the mean of the existing ones.  The base stays the same base: its fingerprint leaves them out.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base.base import Base
from veneer.base.fingerprint import OWN_ROWS
from veneer.errors import ConfigError
from veneer.models.blocks import text_config
from veneer.storage.layers import Stored


def add_tokens(tokenizer: Any, tokens: Iterable[Any]) -> list[int]:
    """Add those of the tokens (text, or transformers' AddedToken) that the tokenizer lacks; returns their ids."""
    from transformers import AddedToken

    made = [AddedToken(t, normalized=False) if isinstance(t, str) else t for t in tokens]
    if empty := [t for t in made if not t.content]:
        raise ConfigError(f"{len(empty)} of the new tokens are empty; give each some text")
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([t for t in made if t.content not in known])
    return [int(tokenizer.convert_tokens_to_ids(t.content)) for t in made]


def token_ids(tokenizer: Any, tokens: Sequence[int | str]) -> list[int]:
    """Ids of tokens given as ids or text.  Raises ConfigError for a text that is not one token."""
    known = tokenizer.get_vocab() if tokenizer is not None else {}
    if unknown := [t for t in tokens if isinstance(t, str) and t not in known]:
        listed = ", ".join(map(repr, unknown[:8]))
        raise ConfigError(f"the tokenizer has no token {listed}; add it as a new token, or give its id")
    return [known[t] if isinstance(t, str) else t for t in tokens]


@torch.no_grad()
def grow_vocabulary_(base: Base, rows: int) -> None:
    """Give the token embedding and the output head at least `rows` rows; tied weights stay tied.

    Raises ConfigError, with nothing changed, where one of them is stored in another form than dense.
    """
    network = base.network
    if rows <= base.embedding_rows:
        return
    modules = [base.embedding] + ([base.head] if base.head_path is not None else [])
    refuse_stored(base, modules)
    grown: dict[int, nn.Parameter] = {}
    for module in modules:
        for name in ("weight", "bias"):
            old = module._parameters.get(name)
            if old is not None and len(old) < rows:
                grown.setdefault(id(old), _grown(old, rows))
    for module in modules:
        for name in ("weight", "bias"):
            if id(module._parameters.get(name)) in grown:
                module._parameters[name] = grown[id(module._parameters[name])]
        setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", rows)
    for holder in (text_config(network), network.config, network):
        if hasattr(holder, "vocab_size"):
            holder.vocab_size = rows


def share_weight(base: Base) -> bool:
    """Whether the token embedding and the output head have one weight."""
    own = base.embedding._parameters.get("weight")
    return own is not None and base.head_path is not None and base.head._parameters.get("weight") is own


def refuse_stored(base: Base, modules: Iterable[nn.Module]) -> None:
    """Raise ConfigError by name for modules whose weight is quantized."""
    paths = {id(m): path for path, m in base.network.named_modules()}
    if stored := [paths[id(m)] for m in modules if isinstance(m, Stored)]:
        raise ConfigError(
            f"{', '.join(stored)} is quantized, and its rows cannot be trained or added to; leave storage.embeddings "
            "and storage.head off"
        )


def mean_row(weight: Tensor, rows: int | None = None) -> Tensor:
    """The mean of the first `rows` rows, or of all, in float32; how a new token starts."""
    return weight[:rows].mean(0, dtype=torch.float32)


def with_rows(weight: Tensor, rows: int) -> Tensor:
    """The weight with rows added up to `rows`, each the mean of the others."""
    more = mean_row(weight).to(weight.dtype).expand(rows - len(weight), *weight.shape[1:])
    return torch.cat([weight, more])


def _grown(old: Tensor, rows: int) -> nn.Parameter:
    new = nn.Parameter(with_rows(old, rows), requires_grad=old.requires_grad)
    setattr(new, OWN_ROWS, getattr(old, OWN_ROWS, len(old)))
    return new
