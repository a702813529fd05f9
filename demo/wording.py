"""From a plan to an English question with a marker for each constant."""

from dataclasses import dataclass
from random import Random

from demo.frames import FRAMES, Words
from demo.phrases import NOUNS, Noun
from demo.plans import Plan
from demo.values import pick

SIZES = ("above", "over", "below", "under", "worth")
PLACES = ("in", "from", "of", "on", "outside")


@dataclass(frozen=True)
class Said:
    """A question whose constants are still markers: "<1.0>" is the first constant of condition 1, "<n>" a slot's."""

    text: str
    order: tuple[int, ...]
    """The conditions' places in the plan, in the order in which the question names them."""


def say(plan: Plan, rng: Random, held_out: bool) -> Said | None:
    """Word a plan, or return None where the phrases drawn do not go together.

    A held-out question has a held-out sentence, and in half of its other places held-out words where there are any.
    """
    frame = FRAMES[plan.frame]
    sentence = pick(rng, frame.held + plan.own.held if held_out else frame.seen + plan.own.seen)
    noun = NOUNS[plan.query.table]
    phrases = [_marked(_choose(rng, Words(f.seen, f.held), held_out), i) for i, f in enumerate(plan.filters)]
    order = sorted(range(len(phrases)), key=lambda i: _weight(phrases[i]))
    named = _choose(rng, Words(noun.many, noun.held), held_out)
    parts = _parts(sentence, [phrases[i] for i in order], noun, named)
    if parts is None:
        return None
    chosen = {slot: _choose(rng, words, held_out) for slot, words in plan.words.items() if words.seen}
    lookup = dict(zip("vw", phrases, strict=False))
    slots = {"k": "<k>", "n": "<n>", "label": noun.label, "who": "Who" if noun.relative == "who" else "What"}
    text = " ".join(sentence.format(**parts, **chosen, **lookup, **slots).split())
    return Said(text.replace(" .", ".").replace(" ?", "?").replace(" ,", ","), tuple(order))


def _choose(rng: Random, words: Words, held_out: bool) -> str:
    return pick(rng, words.held if held_out and words.held and rng.random() < 0.5 else words.seen)


def _marked(phrase: str, place: int) -> str:
    return phrase.format(*(f"<{place}.{i}>" for i in range(phrase.count("{}"))))


def _weight(phrase: str) -> int:
    """Short phrases come before long ones: sizes, places, participles, "with", long phrases, verb phrases."""
    first = phrase.split()[0]
    if first in SIZES:
        return 0
    if first in PLACES:
        return 1
    if first[0] in "~+":
        return 4 if first[0] == "~" else 6 if _denies(phrase) else 5
    return 3 if first in ("with", "without", "holding") else 2


def _denies(phrase: str) -> bool:
    return phrase.startswith(("+do not", "+are not"))


def _parts(sentence: str, phrases: list[str], noun: Noun, named: str) -> dict[str, str] | None:
    """Fill {np}, {np1}, {of}, {noun} and {vp}; `phrases` come in their order.

    A relative clause ends a sentence or is not used: what follows would seem to belong to it.
    """
    verbs = [p for p in phrases if p.startswith("+")]
    others = [p for p in phrases if not p.startswith("+")]
    if "{np1}" in sentence:
        single = _attach(noun.one, others)
        return {"np1": single} if single and not verbs else None
    if "{vp}" in sentence:
        subject = _attach(named, others)
        return {"noun": subject, "vp": " and ".join(v[1:] for v in verbs)} if verbs and subject else None
    full = _attach(named, others)
    if full is None or (verbs and not sentence.endswith(("{np}.", "{np}?", "{of}.", "{of}?"))):
        return None
    if verbs:
        full += f" {noun.relative} " + " and ".join(v[1:] for v in verbs)
    bare = not named
    return {"np": full, "of": full if bare else f"of all {full}" if not phrases else f"of {full}"}


def _attach(noun: str, phrases: list[str]) -> str | None:
    """The noun and one or two phrases after it; None where two would read badly."""
    if len(phrases) < 2:
        return " ".join([noun, *phrases]).replace("~", "").strip()
    first, second = phrases
    if first.startswith("with ") and second.startswith(("with ", "~with ")):
        return f"{noun} {first} and {second.split(' ', 1)[1]}"
    same = _weight(first) == _weight(second)
    if same and first.split()[0] == second.split()[0]:
        return None
    joint = " and " if same and _weight(first) > 1 else " "
    return f"{noun} {first}{joint}{second}".replace("~", "")
