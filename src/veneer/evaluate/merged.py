"""Merge an adapter and prove it: the merged model is loaded again and compared with the unmerged one on real rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from veneer.adapters.attach import Adapter
from veneer.errors import Refused
from veneer.generate.engine import generate
from veneer.generate.stop import stop_ids
from veneer.merge.fold import merge
from veneer.merge.verify import Drift, compare, logits_along
from veneer.models.load import Loaded, load_model

MOST_DRIFT = 0.05
"""Largest relative drift that rounding explains; above it the merged model is refused."""
NEW_TOKENS = 24


@dataclass(frozen=True)
class Merged:
    """A merged model that was checked."""

    folder: str
    bytes: int
    drift: Drift


def merge_and_verify(
    loaded: Loaded,
    adapter: Adapter,
    into: Path,
    prompts: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Merged:
    """Fold `adapter`, attached to `loaded`, into a folder, and compare the two on `prompts` (token ids).

    Raises Refused if the merged model says something else than rounding explains; the folder stays, to be looked at.
    """
    say("writing the unmerged model's answers")
    stops = stop_ids(loaded.model, loaded.tokenizer)
    greedy = generate(loaded.model, prompts, max_new_tokens=NEW_TOKENS, stop_ids=stops)
    before = logits_along(loaded.model, prompts, greedy)
    say(f"folding {len(adapter.deltas)} deltas into {into}")
    size = merge(adapter, loaded.path, into, dtype=dtype)
    say("comparing the merged model with the unmerged one")
    merged = load_model(into, dtype=loaded.model.dtype)
    drift = compare(before, logits_along(merged.model, prompts, greedy))
    if not drift.relative_drift <= MOST_DRIFT or drift.greedy_agreement * drift.rows + drift.near_ties < drift.rows:
        raise Refused(
            f"the merged model {into} does not say what the unmerged one says: relative drift "
            f"{drift.relative_drift:.3g} (at most {MOST_DRIFT}), same greedy text on {drift.greedy_agreement:.0%} of "
            f"{drift.rows} rows, {drift.near_ties} near ties. Try --dtype float32, or keep the adapter unmerged."
        )
    return Merged(str(into), size, drift)
