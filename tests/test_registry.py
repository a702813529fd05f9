"""A registry refuses taken names, lists what exists on a miss, and keeps names in order."""

import sys
from pathlib import Path

import pytest

from veneer.errors import ConfigError
from veneer.registry import Registry, import_siblings


@pytest.fixture
def colors() -> Registry[int]:
    registry: Registry[int] = Registry("color")
    registry.add("red")(1)
    registry.add("blue")(2)
    return registry


def test_things_are_found_by_name_and_listed_in_order(colors: Registry[int]) -> None:
    assert colors["red"] == 1
    assert list(colors) == ["blue", "red"]
    assert len(colors) == 2
    assert "red" in colors
    assert "green" not in colors


def test_the_decorator_returns_what_it_registers(colors: Registry[int]) -> None:
    assert colors.add("green")("anything") == "anything"


def test_a_taken_name_is_refused_and_the_first_thing_stays(colors: Registry[int]) -> None:
    with pytest.raises(ConfigError, match=r"^color 'red' is already registered, by 1$"):
        colors.add("red")(3)
    assert colors["red"] == 1


def test_a_miss_names_close_matches_and_all_that_exist(colors: Registry[int]) -> None:
    with pytest.raises(ConfigError, match=r"^there is no color 'rad'\. Did you mean 'red'\? Known: blue, red\.$"):
        colors["rad"]
    with pytest.raises(ConfigError, match=r"^there is no color 'x'\. Known: blue, red\.$"):
        colors["x"]


def test_siblings_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "made_siblings"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from veneer.registry import Registry, import_siblings\n"
        "THINGS = Registry('thing')\n"
        "import_siblings(__name__, list(__path__))\n"
    )
    (package / "one.py").write_text("from made_siblings import THINGS\n@THINGS.add('one')\ndef one(): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_siblings("made_siblings", [str(package)])
    assert list(sys.modules["made_siblings"].THINGS) == ["one"]
