"""Every error veneer raises on purpose, as one tree.

VeneerError                      exit status 1
|-- InputError(ValueError)       exit status 2: what was given cannot be used; change it and run again
|   |-- ConfigError              a setting: unknown, of the wrong type or out of range
|   |-- DataError                a file of rows: missing, malformed, or with nothing to learn from
|   |-- ModelError               a model: not found, incomplete, or of an unsupported kind
|   |-- TargetError              target names that match no module, or modules that no method can adapt
|   |-- NotFoldable              a delta that is not a change of one weight, so it cannot be merged
|   `-- AdapterMismatch          an adapter folder that does not fit the model
|-- TrainingError                training cannot continue (a loss that is not finite, a parameter without gradient)
|-- DiskError                    a file could not be read or written completely
`-- Refused                      exit status 3: it would not fit in memory, or did not verify

A message says what was given, what was expected, where, and what to do. It lists all problems, not only the first.
"""

import difflib
from collections.abc import Iterable, Sequence


class VeneerError(Exception):
    """Base of the tree; `exit_status` is what the command line returns."""

    exit_status = 1


class InputError(VeneerError, ValueError):
    """The input cannot be used."""

    exit_status = 2


class ConfigError(InputError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(InputError):
    """Rows are missing, malformed, or hold nothing to learn from."""


class ModelError(InputError):
    """A model was not found, is incomplete, or is of an unsupported kind."""


class TargetError(InputError):
    """Targets match no module, or a module that the method cannot adapt."""


class AdapterMismatch(InputError):
    """An adapter folder does not fit the model."""


class NotFoldable(InputError):
    """This delta is not a change of one weight, so it cannot be merged."""


class TrainingError(VeneerError):
    """Training cannot continue."""


class DiskError(VeneerError, OSError):
    """A file could not be read or written completely."""


class Refused(VeneerError):
    """The run would not fit in memory, or a result did not verify."""

    exit_status = 3


def did_you_mean(word: str, known: Iterable[str], most: int = 3) -> str:
    """The end of a sentence about an unknown word: `. Did you mean 'rank'?`, or just a full stop.

    >>> did_you_mean("rnak", ["rank", "alpha"])
    ". Did you mean 'rank'?"
    """
    close = difflib.get_close_matches(word, list(known), n=most, cutoff=0.6)
    return f". Did you mean {' or '.join(repr(c) for c in close)}?" if close else "."


def listed(items: Sequence[str], most: int = 8, separator: str = "") -> str:
    """The first `most` items and the number of the others: one per line, indented, or joined by `separator`.

    >>> listed(["q_proj", "k_proj", "v_proj"], 2, ", ")
    'q_proj, k_proj and 1 more'
    """
    left = len(items) - most
    if separator:
        return separator.join(items[:most]) + (f" and {left} more" if left > 0 else "")
    lines = [f"  {line}" for item in items[:most] for line in item.splitlines()]
    return "\n".join([*lines, f"  ... and {left} more"] if left > 0 else lines)
