"""Rows of a data set on the Hugging Face hub, through its own library."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from veneer.errors import DataError


def read_hub(source: str, split: str, limit: int | None) -> Iterable[dict[str, Any]]:
    """At most `limit` rows of `split` of NAME or NAME:CONFIG, downloaded once and cached by `datasets`.

    Raises DataError if the library is missing, the hub cannot be reached, or there is no such data set or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"there is no file {source}; to read it as a hub data set: pip install 'veneer[data]' (needs `datasets`)"
        ) from error
    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"there is no file {source}, and as a hub data set (split {split!r}) it was not loaded:\n"
            f"  {type(error).__name__}: {str(error).strip()}\n"
            "Offline, download the rows elsewhere and name the .jsonl or .parquet file instead."
        ) from error
    return islice(rows, limit)
