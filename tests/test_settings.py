"""Settings of registered things: what fits becomes the dataclass, what does not is said in words."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from veneer.errors import ConfigError
from veneer.settings import typed


@dataclass(frozen=True, kw_only=True)
class Kettle:
    liters: float = 1.0
    color: Literal["red", "Blue"] = "red"
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.liters > 3:
            raise ConfigError(f"kettle.liters must be at most 3, got {self.liters}")


@dataclass(frozen=True)
class Nothing:
    pass


def test_what_fits() -> None:
    assert typed("vessel", "kettle", Kettle, {"liters": 2, "color": "Blue"}) == Kettle(liters=2.0, color="Blue")
    assert typed("vessel", "void", Nothing, {}) == Nothing()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"litres": 1},
         "vessel kettle has no setting 'litres'. Did you mean 'liters'?\nIt has: liters, color, counts."),
        ({"liters": 4}, "kettle.liters must be at most 3, got 4.0"),
        ({"color": "blue"}, "kettle.color is 'blue': input should be 'red' or 'Blue'"),
        ({"liters": "x", "counts": {"a": 1.5}}, "kettle.liters is 'x': input should be a valid number, unable to parse "
         "string as a number\nkettle.counts.a is 1.5: input should be a valid integer, got a number with a fractional "
         "part"),
    ],
)  # fmt: skip
def test_what_does_not(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        typed("vessel", "kettle", Kettle, settings)
    assert str(caught.value) == message


def test_what_has_no_settings_says_so() -> None:
    with pytest.raises(ConfigError, match=r"vessel void has no setting 'x'\.\nIt has: none\."):
        typed("vessel", "void", Nothing, {"x": 1})
