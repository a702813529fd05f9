"""The tree of errors: exit statuses, what can be caught as what, and the helper for close matches."""

import inspect

import pytest

from veneer import errors
from veneer.errors import DiskError, InputError, Refused, VeneerError, did_you_mean, listed

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_in_the_tree_and_in_its_picture(kind: type[Exception]) -> None:
    assert issubclass(kind, VeneerError)
    assert kind.__name__ in (errors.__doc__ or "")
    assert str(kind("what, where, what to do")) == "what, where, what to do"


def test_exit_statuses() -> None:
    assert {c.__name__: c.exit_status for c in CLASSES} == {
        "VeneerError": 1,
        "InputError": 2,
        "ConfigError": 2,
        "DataError": 2,
        "ModelError": 2,
        "TargetError": 2,
        "AdapterMismatch": 2,
        "NotFoldable": 2,
        "TrainingError": 1,
        "DiskError": 1,
        "Refused": 3,
    }


def test_input_errors_are_value_errors_and_disk_errors_are_os_errors() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(DiskError, OSError)
    assert not issubclass(Refused, ValueError)


@pytest.mark.parametrize(
    ("word", "known", "said"),
    [
        ("rnak", ["rank", "alpha"], ". Did you mean 'rank'?"),
        ("q_prj", ["q_proj", "k_proj"], ". Did you mean 'q_proj' or 'k_proj'?"),
        ("zebra", ["rank", "alpha"], "."),
        ("rank", [], "."),
        ("aaaa", ["aaab", "aaac", "aaad", "aaae"], ". Did you mean 'aaae' or 'aaad' or 'aaac'?"),
    ],
)
def test_did_you_mean(word: str, known: list[str], said: str) -> None:
    assert did_you_mean(word, known) == said


@pytest.mark.parametrize(
    ("items", "most", "separator", "wanted"),
    [
        (["a", "b"], 2, "", "  a\n  b"),
        (["a\nof two lines", "b", "c"], 1, "", "  a\n  of two lines\n  ... and 2 more"),
        (["a", "b"], 2, ", ", "a, b"),
        (["a", "b", "c", "d"], 2, "; ", "a; b and 2 more"),
        ([], 8, "", ""),
    ],
)
def test_long_lists_are_cut_and_counted(items: list[str], most: int, separator: str, wanted: str) -> None:
    assert listed(items, most, separator) == wanted
