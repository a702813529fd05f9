"""Constants from other companies, put into a part of the training questions in place of this one's.

A company has few cities, titles or statuses. A model that sees only those learns them by heart and writes one of them
whatever the question says; a model that also sees others learns to copy. Such questions are for training alone: their
SQL is right, but the demo's database has no row for it. No reserved constant is among them.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from demo.questions import Question
from demo.values import (
    CITIES,
    CUSTOMERS,
    DEPARTMENTS,
    FIRST_NAMES,
    INDUSTRIES,
    LAST_NAMES,
    ORDER_STATUSES,
    PROJECT_STATUSES,
    PROJECTS,
    TITLES,
    pick,
    reserved,
)

SHARE = 0.5
"""Of the training questions that name a word; the others keep this company's."""


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


OTHERS: dict[tuple[str, ...], tuple[str, ...]] = {
    CITIES: _list(
        "Paris, London, Zurich, Basel, Lyon, Turin, Naples, Seville, Valencia, Krakow, Gdansk, Tallinn, Riga, "
        "Vilnius,  Malmo, Aarhus, Cork, Leeds, Bristol, Ghent, Antwerp, Utrecht, Bonn, Leipzig, Graz, Split, "
        "Sofia, Tartu, Nice"
    ),
    TITLES: _list(
        "Librarian, Carpenter, Nurse, Editor, Translator, Lawyer, Chemist, Buyer, Planner, Controller, "
        "Receptionist,  Plant Manager, Store Manager, Software Tester, Press Officer, Security Guard, "
        "Electrician, Pilot, Cook,  Web Developer, Product Owner, Statistician, Assistant, Auditor, "
        "Inspector, Coach, Machinist, Economist"
    ),
    DEPARTMENTS: _list(
        "Purchasing, Accounting, Operations, Quality, Security, Training, Maintenance, Production, Planning, "
        "Catering,  Communications, Analytics, Customer Care, Public Relations, Facilities, Testing, Payroll, "
        "Exports"
    ),
    INDUSTRIES: _list(
        "Banking, Mining, Shipping, Publishing, Software, Fishing, Aviation, Forestry, Hospitality, "
        "Construction, Steel,  Chemicals, Printing, Fashion, Gaming, Music, Sports, Telecom, Brewing, "
        "Recycling"
    ),
    ORDER_STATUSES: _list(
        "returned, approved, rejected, invoiced, packed, lost, drafted, confirmed, overdue, disputed, "
        "archived, blocked,  delivered, reserved, reopened, exported, postdated, damaged, accepted, held"
    ),
    PROJECT_STATUSES: _list(
        "cancelled, archived, approved, blocked, late, stalled, reviewed, abandoned, proposed, frozen, "
        "running, rejected,  suspended, reopened, closed, drafted, funded, overdue, merged, secret"
    ),
    PROJECTS: _list(
        "Amber, Basalt, Cascade, Dynamo, Echo, Fjord, Glacier, Halo, Indigo, Jasper, Kestrel, Lotus, Magnet, "
        "Nova, Onyx,  Prism, Quill, Ripple, Saffron, Tango, Umbra, Violet, Walnut, Yonder, Zenith, Acorn, "
        "Bonfire, Comet"
    ),
    CUSTOMERS: tuple(
        f"{first} {second}"
        for first in _list("Amber, Blue, Copper, Eastern, Grand, Iron, Lunar, Royal, Swift, Willow")
        for second in _list("Bakery, Tools, Airlines, Pharma, Systems, Garden, Optics, Brothers")
    ),
}
OTHER_FIRST = _list(
    "Ana, Bruno, Chloe, Dario, Erik, Fiona, Goran, Hana, Ivan, Julia, Karim, Lena, Milan, Nils, Olga, Paul"
)
OTHER_LAST = _list(
    "Adler, Bauer, Conti, Dubois, Eriksen, Fontana, Gruber, Horvat, Ivanov, Jensen, Kovacs, Larsen, Meyer"
)


def from_elsewhere(questions: Sequence[Question], seed: int) -> list[Question]:
    """The questions, in about half of which every name, place, title and status is another company's."""
    rng = Random(seed)
    return [_moved(q, rng) if rng.random() < SHARE else q for q in questions]


def _moved(question: Question, rng: Random) -> Question:
    text, sql = question.question, question.sql
    for literal in dict.fromkeys(re.findall(r"'([^']*)'", sql)):
        other = _other(literal, sql, rng)
        if other is not None and len(re.findall(rf"\b{re.escape(literal)}\b", text)) == 1:
            text = re.sub(rf"\b{re.escape(literal)}\b", other, text)
            sql = sql.replace(f"'{literal}'", f"'{other}'")
    return replace(question, question=text, sql=sql)


def _other(literal: str, sql: str, rng: Random) -> str | None:
    """Another constant of the same sort that is not reserved; None for dates and for what is of no sort."""
    for own, others in OTHERS.items():
        if literal in own:
            return pick(rng, [o for o in others if not reserved(o) and f"'{o}'" not in sql])
    first, _, last = literal.partition(" ")
    if first in FIRST_NAMES and last in LAST_NAMES:
        names = [f"{f} {s}" for f in OTHER_FIRST for s in OTHER_LAST]
        return pick(rng, [n for n in names if not reserved(n)])
    return None
