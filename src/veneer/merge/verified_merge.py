"""Merge an adapter and prove it: the merged model is loaded again and compared with the unmerged one on real rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from veneer.adapters.adapter import Adapter
from veneer.base.base import Base
from veneer.base.load import load_model
from veneer.data.render import Renderer, TooLong
from veneer.data.sources import Row
from veneer.disk.tensors import open_tensors
from veneer.errors import ConfigError, DataError, Refused
from veneer.generate.engine import generate
from veneer.generate.stop import stop_ids
from veneer.merge.fold import merge, refuse_taken, refuse_unfoldable
from veneer.merge.verify import Drift, compare, logits_along

MOST_DRIFT = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
"""Largest relative drift that rounding explains, by the coarsest dtype in which weights are written or computed; above
it the merged model is refused."""
NEW_TOKENS = 24


@dataclass(frozen=True)
class Merged:
    """A merged model that was checked."""

    folder: str
    bytes: int
    drift: Drift


def merge_and_verify(
    loaded: Base,
    adapter: Adapter,
    into: Path,
    prompts: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Merged:
    """Fold `adapter`, attached to `loaded`, into a folder, and compare the two on `prompts` (token ids).

    Of prompts too long for the model only the end is read.  Raises what `merge` raises, ConfigError for an adapter that
    is not attached, DataError for no prompts, and Refused if the merged model says something else than rounding
    explains; its folder then stays, to be looked at.
    """
    refuse_taken(into, loaded.files)
    refuse_unfoldable(adapter)
    if not adapter.attached:
        raise ConfigError("the adapter is not attached, so there is no unmerged model to compare with; attach it first")
    if not prompts:
        raise DataError("there are no rows to verify the merged model on")
    say("writing the unmerged model's answers")
    adapter.eval()
    asked = _fitting(loaded, prompts)
    stops = stop_ids(loaded.network, loaded.tokenizer)
    greedy = generate(loaded.network, asked, max_new_tokens=NEW_TOKENS, stop_ids=stops)
    before = logits_along(loaded.network, asked, greedy)
    say(f"folding {len(adapter.deltas)} deltas into {into}")
    size = merge(adapter, loaded.files, into, dtype=dtype)
    say("comparing the merged model with the unmerged one")
    merged = load_model(into, dtype=loaded.network.dtype)
    drift = compare(before, logits_along(merged.network, asked, greedy))
    most = _most_drift(into, loaded.network.dtype)
    if not drift.relative_drift <= most or drift.parted:
        raise Refused(
            f"the merged model {into} does not say what the unmerged one says: relative drift "
            f"{drift.relative_drift:.3g} (at most {most} is rounding), same greedy text on "
            f"{drift.greedy_agreement:.0%} of {drift.rows} rows, {drift.near_ties} near ties. It was left there to be "
            "looked at; do not use it. Merge anew with --dtype float32, or keep the adapter beside its model."
        )
    return Merged(str(into), size, drift)


def beginnings(rows: Sequence[Row], renderer: Renderer) -> list[list[int]]:
    """What a model reads of each row before it writes: the prompt, or the first half of a running text.

    Rows that the renderer drops for their length are passed over.  Raises DataError with a row's place.
    """
    found = []
    for row in rows:
        try:
            running = renderer.layout(row).name == "text"
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from error
        if not running:
            found.append(renderer.prompt(row))
        elif not isinstance(example := renderer.example(row), TooLong):
            found.append(example.tokens[: max(1, len(example) // 2)].tolist())
    return found


def _fitting(loaded: Base, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ends of prompts that leave room for an answer in the model's positions."""
    positions = getattr(loaded.network.config.get_text_config(decoder=True), "max_position_embeddings", None)
    most = max(1, positions - NEW_TOKENS) if positions else max(map(len, prompts))
    return [list(prompt[-most:]) for prompt in prompts]


def _most_drift(folder: Path, computed: torch.dtype) -> float:
    dtypes = {computed, *(entry.dtype for entry in open_tensors(folder).values() if entry.dtype.is_floating_point)}
    return max(MOST_DRIFT.get(dtype, max(MOST_DRIFT.values())) for dtype in dtypes)
