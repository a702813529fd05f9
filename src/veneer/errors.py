"""Every error veneer raises on purpose, as one tree.

VeneerError                      exit status 1
|-- InputError(ValueError)       exit status 2: what was given cannot be used; change it and run again
|   |-- ConfigError              a setting: unknown, of the wrong type or out of range
|   |-- DataError                a file of rows: missing, malformed, or with nothing to learn from
|   |-- ModelError               a model: not found, not complete, or of a kind that does not fit
|   |-- TargetError              target names that match no module, or modules no method can adapt
|   |-- NotFoldable              a delta that is no weight change, asked to become one
|   `-- AdapterMismatch          an adapter folder and a model that do not belong together
|-- TrainingError                training cannot go on (a loss that is not finite, a parameter without gradient)
|-- DiskError                    a file could not be written or read whole
`-- Refused                      exit status 3: it would not fit, or did not verify

A message says what was given, what was wanted, where, and what to do; where several things are wrong it lists them all.
"""

import difflib
from collections.abc import Iterable


class VeneerError(Exception):
    """Base of the tree; `exit_status` is what the command line returns."""

    exit_status = 1


class InputError(VeneerError, ValueError):
    """What was given cannot be used."""

    exit_status = 2


class ConfigError(InputError):
    """A setting is unknown, of the wrong type or out of range."""


class DataError(InputError):
    """Rows are missing, malformed, or hold nothing to learn from."""


class ModelError(InputError):
    """A model was not found, is not complete, or is of a kind that does not fit."""


class TargetError(InputError):
    """Targets match no module, or a module that the method cannot adapt."""


class AdapterMismatch(InputError):
    """An adapter folder and a model do not belong together."""


class NotFoldable(InputError):
    """This delta is not a change of one weight, so it cannot be folded."""


class TrainingError(VeneerError):
    """Training cannot go on."""


class DiskError(VeneerError, OSError):
    """A file could not be written or read whole."""


class Refused(VeneerError):
    """Would not fit, or did not verify."""

    exit_status = 3


def did_you_mean(word: str, known: Iterable[str], most: int = 3) -> str:
    """The end of a sentence about an unknown word: `. Did you mean 'rank'?`, or just a full stop.

    >>> did_you_mean("rnak", ["rank", "alpha"])
    ". Did you mean 'rank'?"
    """
    close = difflib.get_close_matches(word, list(known), n=most, cutoff=0.6)
    return f". Did you mean {' or '.join(repr(c) for c in close)}?" if close else "."
