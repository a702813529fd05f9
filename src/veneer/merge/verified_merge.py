"""Merge an adapter and prove it: the merged model is loaded again and compared with the unmerged one on real rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veneer.adapters.adapter import Adapter
from veneer.base.base import Base
from veneer.base.load import Say, load_model
from veneer.data.prompt_format import recorded_settings, recorded_source
from veneer.data.render import Renderer, TooLong
from veneer.data.sources import Row, read_rows
from veneer.disk.tensors import open_tensors
from veneer.errors import ConfigError, DataError, Refused
from veneer.generate.engine import generate
from veneer.merge.fold import merge, refuse_taken, refuse_unfoldable
from veneer.merge.verify import Drift, compare, logits_along

MOST_DRIFT = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
"""Largest relative drift that rounding explains, by the coarsest dtype in which weights are written or computed; above
it the merged model is refused."""
NEW_TOKENS = 24
PROBES = (
    "The capital of France is",
    "def fibonacci(n):",
    "SELECT name, count(*) FROM",
    "Water boils at a temperature of",
    "Dear Ms. Lindqvist, thank you for",
    "1, 1, 2, 3, 5, 8,",
    "Question: Who wrote Hamlet? Answer:",
    "Once upon a time, in a village by the sea,",
)
"""Texts to verify on where no rows are known."""


@dataclass(frozen=True)
class Merged:
    """A merged model that was checked."""

    folder: str
    bytes: int
    drift: Drift


def merge_and_verify(
    base: Base,
    adapter: Adapter,
    into: Path,
    prompts: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype | None = None,
    say: Say = lambda _: None,
) -> Merged:
    """Fold `adapter`, attached to `base`, into a folder, and compare the two on `prompts` (token ids).

    Of prompts too long for the model only the end is read.  Raises what `merge` raises, ConfigError for an adapter that
    is not attached, DataError for no prompts, and Refused if the merged model says something else than rounding
    explains; its folder then stays, to be looked at.
    """
    refuse_taken(into, base.files)
    refuse_unfoldable(adapter)
    if not adapter.attached:
        raise ConfigError("the adapter is not attached, so there is no unmerged model to compare with; attach it first")
    if not prompts:
        raise DataError("there are no rows to verify the merged model on")
    say("writing the unmerged model's answers")
    adapter.eval()
    asked = _fitting(base, prompts)
    greedy = generate(base, asked, max_new_tokens=NEW_TOKENS)
    before = logits_along(base, asked, greedy)
    say(f"folding {len(adapter.deltas)} deltas into {into}")
    size = merge(adapter, base.files, into, dtype=dtype)
    say("comparing the merged model with the unmerged one")
    merged = load_model(into, dtype=base.dtype, device=base.device)
    drift = compare(before, logits_along(merged, asked, greedy))
    most = _most_drift(into, base.dtype)
    if not drift.relative_drift <= most or drift.parted:
        raise Refused(
            f"the merged model {into} does not say what the unmerged one says: relative drift "
            f"{drift.relative_drift:.3g} (at most {most} is rounding), same greedy text on "
            f"{drift.greedy_agreement:.0%} of {drift.rows} rows, {drift.near_ties} near ties. It was left there to be "
            "looked at; do not use it. Merge again with dtype=torch.float32, or keep the adapter beside its model."
        )
    return Merged(str(into), size, drift)


def verification_prompts(
    base: Base,
    facts: Mapping[str, Any],
    data: str | None = None,
    *,
    rows: int = 50,
    say: Say = lambda _: None,
    **given: Any,
) -> list[list[int]]:
    """Prompts to verify a merge on: beginnings of rows of `data`, else of the recorded rows, else built-in texts.

    facts   of the adapter: how its rows were put
    given   settings of `data` that outrank the recorded ones
    Raises DataError or ConfigError for rows that were named and cannot be used.
    """
    source = data or recorded_source(facts)
    if source is not None:
        settings, most = recorded_settings(facts, source, **given)
        try:
            found = read_rows(source, split=settings.split, limit=rows)
            return beginnings(found, Renderer(base.tokenizer, settings, most))
        except DataError as error:
            if data is not None:
                raise
            raise DataError(
                f"the adapter was trained on {source}: {error}. Name rows to verify on (data=FILE)"
            ) from error
    say(f"verifying on {len(PROBES)} built-in texts")
    return [list(map(int, base.tokenizer(text)["input_ids"])) for text in PROBES]


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


def _fitting(base: Base, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ends of prompts that leave room for an answer in the model's positions."""
    positions = base.max_positions
    most = max(1, positions - NEW_TOKENS) if positions else max(map(len, prompts))
    return [list(prompt[-most:]) for prompt in prompts]


def _most_drift(folder: Path, computed: torch.dtype) -> float:
    dtypes = {computed, *(entry.dtype for entry in open_tensors(folder).values() if entry.dtype.is_floating_point)}
    return max(MOST_DRIFT.get(dtype, max(MOST_DRIFT.values())) for dtype in dtypes)
