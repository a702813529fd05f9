"""The constants of the company database, and which of them only held-out questions may name."""

import zlib
from collections.abc import Sequence
from random import Random
from typing import TypeVar

Item = TypeVar("Item")

CITIES = ("Oslo", "Lisbon", "Vienna", "Dublin", "Prague", "Madrid", "Geneva", "Athens", "Warsaw", "Helsinki")
TITLES = ("Engineer", "Accountant", "Data Analyst", "Designer", "Sales Manager", "Recruiter", "Technician", "Trainer")
DEPARTMENTS = ("Sales", "Marketing", "Engineering", "Support", "Logistics", "Research", "Human Resources")
INDUSTRIES = ("Retail", "Energy", "Healthcare", "Education", "Media", "Transport")
ORDER_STATUSES = ("paid", "pending", "shipped", "cancelled")
PROJECT_STATUSES = ("active", "finished", "planned")

HELD_OUT_CITIES = ("Berlin", "Rome", "Porto", "Bergen")
HELD_OUT_TITLES = ("Consultant", "Office Manager", "Architect")
HELD_OUT_DEPARTMENTS = ("Finance", "Legal", "Design")
HELD_OUT_INDUSTRIES = ("Insurance", "Tourism", "Farming")
HELD_OUT_ORDER_STATUSES = ("refunded", "delayed")
HELD_OUT_PROJECT_STATUSES = ("paused", "postponed")

HELD_OUT_WORDS = frozenset(
    HELD_OUT_CITIES
    + HELD_OUT_TITLES
    + HELD_OUT_DEPARTMENTS
    + HELD_OUT_INDUSTRIES
    + HELD_OUT_ORDER_STATUSES
    + HELD_OUT_PROJECT_STATUSES
)
TRAINING_WORDS = frozenset(CITIES + TITLES + DEPARTMENTS + INDUSTRIES + ORDER_STATUSES + PROJECT_STATUSES)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Mara Jonas Elena Viktor Aisha Pavel Ingrid Tomas Lucia Henrik Nadia Oscar Priya Samuel Greta Marco Yuki Daniel "
    "Sofia Liam Amara Felix Carmen Anton Leila Hugo Clara Ravi Nora Emil"
)
LAST_NAMES = _words(
    "Lindqvist Becker Novak Moreau Okafor Silva Hansen Rossi Petrov Keller Tanaka Byrne Costa Vogel Nilsen Duarte "
    "Weber Ferrari Kowalski Murphy Sato Andersen Haddad Lopez Fischer Gupta Virtanen Papadakis Brandt Marin"
)
PROJECTS = _words(
    "Aurora Beacon Cobalt Delta Ember Falcon Granite Harbor Iris Juniper Keystone Lantern Meridian Nimbus Orchid "
    "Pioneer Quartz Raven Summit Tundra Vertex Willow Zephyr Atlas Compass Horizon Mosaic Pebble"
)
CUSTOMERS = tuple(
    f"{first} {second}"
    for first in ("Alder", "Bright", "Cedar", "Golden", "Maple", "Northern", "Silver", "Stone")
    for second in ("Foods", "Motors", "Textiles", "Partners", "Labs")
)
MONTHS = _words("January February March April May June July August September October November December")


def reserved(constant: str) -> bool:
    """Whether a constant, as a question writes it, belongs to held-out questions only.

    Listed words: those above.  Numbers (years too): divisible by three.  Dates and "March 2019": by their year.
    Names of employees, projects and customers: a third of them, by CRC-32 of the name.
    """
    if constant in HELD_OUT_WORDS or constant in TRAINING_WORDS:
        return constant in HELD_OUT_WORDS
    if constant.isdigit():
        return int(constant) % 3 == 0
    if constant[:4].isdigit():
        return int(constant[:4]) % 3 == 0
    if constant.split()[0] in MONTHS and constant[-4:].isdigit():
        return int(constant[-4:]) % 3 == 0
    return zlib.crc32(constant.encode()) % 3 == 0


def pick(rng: Random, items: Sequence[Item]) -> Item:
    """One of the items. Uses `random()` alone, whose sequence Python promises to keep from version to version."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: Random, items: Sequence[Item]) -> list[Item]:
    """The items in a random order, by `random()` alone."""
    keyed = sorted((rng.random(), place) for place in range(len(items)))
    return [items[place] for _, place in keyed]
