"""YAML read strictly."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.errors import ConfigError
from veneer.recipe.yaml_io import read_tree, read_value, write_tree

FILE = Path("recipe.yaml")


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_tree(FILE, text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("1E5", 1e5), ("-3e+2", -300.0), (".5e1", 5.0), ("1.", 1.0), ("7", 7), ("1.5", 1.5),
     ("e5", "e5"), ("1e", "1e"), ("2e-4x", "2e-4x"), ("'2e-4'", "2e-4"), ("true", True), ("null", None)],
)  # fmt: skip
def test_numbers_are_as_everybody_writes_them(text: str, value: Any) -> None:
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)


def test_where_each_key_stands() -> None:
    tree, lines = read_tree(FILE, "a: 1\nb:\n  c:\n    d: 2\n  e: [{f: 3}]\n")
    assert tree == {"a": 1, "b": {"c": {"d": 2}, "e": [{"f": 3}]}}
    assert lines == {"a": 1, "b": 2, "b.c": 3, "b.c.d": 4, "b.e": 5, "b.e.f": 5}


def test_a_key_given_twice_names_both_lines() -> None:
    assert (
        complaint("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n") == "recipe.yaml, line 5: b.c is given twice (first in line 3)"
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: 1\nb: [1, 2\nc: 3", "recipe.yaml, line 3: not valid YAML: "),
        ("a: 1\n\tb: 2", "recipe.yaml, line 2: not valid YAML: "),
        ("", "recipe.yaml: a recipe is a YAML mapping (model: ..., data: ..., run: ...), but this is empty"),
        ("- a\n- b", "recipe.yaml: a recipe is a YAML mapping (model: ..., data: ..., run: ...), but this is a list"),
        (
            "hello",
            "recipe.yaml: a recipe is a YAML mapping (model: ..., data: ..., run: ...), but this is a single value",
        ),
        ("a: 1\n5: 2", "recipe.yaml, line 2: 5 is no name; if it is meant as one, put quotes around it"),
        ("a: 1\non: 2", "recipe.yaml, line 2: on is no name; if it is meant as one, put quotes around it"),
        ("? [a, b]\n: 2", "recipe.yaml, line 1: "),
        ("a: &x {b: *x}", "recipe.yaml, line 1: a.b contains itself"),
        ("a: &x [*x]", "recipe.yaml, line 1: a contains itself"),
        ("a: 2024-13-45", "recipe.yaml: not valid YAML: month must be in 1..12"),
        ("a: !!int x", "recipe.yaml: not valid YAML: invalid literal"),
        ("a: !!python/object:os.system x", "recipe.yaml, line 1: not valid YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "recipe.yaml, line 2: not valid YAML: but found another document"),
        ("a: \x00", "recipe.yaml: not valid YAML: "),
        ("[" * 5000, "recipe.yaml: not valid YAML: "),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_what_is_wrong_has_its_line(text: str, wanted: str) -> None:
    assert complaint(text).startswith(wanted)


def test_a_value_that_is_no_yaml() -> None:
    with pytest.raises(ConfigError, match=r"'\[a' is not valid YAML: expected"):
        read_value("[a")


def test_a_file_of_references_is_read_in_no_time() -> None:
    text = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 60))
    _, lines = read_tree(FILE, text)
    assert len(lines) == 60 + 1 + 2 * 59


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
INNER = st.lists(LEAVES, max_size=4) | st.dictionaries(st.text(), LEAVES, max_size=4) | LEAVES
TREES = st.dictionaries(st.text(), st.dictionaries(st.text(), INNER, max_size=4) | INNER, max_size=4)


@settings(deadline=None)
@given(TREES)
def test_what_is_written_is_read_back_as_it_was(tree: dict[str, Any]) -> None:
    assert read_value(write_tree(tree)) == tree


@pytest.mark.parametrize(
    "text", ["2e-4", "1E5", ".5e1", "1.", "on", "null", "~", "2024-01-01", "{x}", "", " a ", "a: b"]
)
def test_a_text_stays_a_text(text: str) -> None:
    assert read_tree(FILE, write_tree({"run": text}))[0] == {"run": text}


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("ab01:.-?!&*[]{}#|>'\"%@`,e \n\t"), max_size=40))
def test_nothing_but_config_errors(text: str) -> None:
    try:
        tree, _ = read_tree(FILE, text)
    except ConfigError as error:
        assert str(error).startswith("recipe.yaml")
    else:
        assert isinstance(tree, dict)
