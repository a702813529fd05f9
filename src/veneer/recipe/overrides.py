"""A recipe with other values for some keys, and what differs between two."""

from collections.abc import Iterator, Mapping
from typing import Any

from veneer.recipe.aliases import SECTIONS
from veneer.recipe.load import recipe_from
from veneer.recipe.settings import Recipe

Changes = dict[str, Any]
"""Dotted key -> value."""


def with_changes(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """The recipe with these keys instead.  Raises ConfigError where they do not go with the others."""
    tree = recipe.model_dump(mode="json")
    for dotted, value in changes.items():
        section, _, key = dotted.rpartition(".")
        (tree[section] if section else tree)[key] = value
    return recipe_from(tree)


def differences(before: Recipe, after: Recipe) -> Changes:
    """The keys whose values differ, with those of `after`; `with_changes` of the one gives the other."""
    old = dict(flat(before.model_dump(mode="json")))
    return {key: value for key, value in flat(after.model_dump(mode="json")) if old.get(key, ...) != value}


def flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Dotted key -> value, with the sections of a recipe opened."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and key in SECTIONS:
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in value.items())
        else:
            yield key, value
