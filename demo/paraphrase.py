"""More ways to say a training question, by rules on its text; the SQL stays.

The grammar of the other modules says each condition in two to four ways, which a model learns by heart. These rules
put a part of the training questions into further words, none of which held-out questions use.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from demo.questions import Question
from demo.values import pick

SHARE = 0.5
"""Of the training questions to which a rule fits, by rule."""

FLAGGED = ("flagged as", "listed as", "tagged as", "recorded as", "labeled", "whose status is")
ARE_FLAGGED = ("are flagged as", "are listed as", "are tagged as", "are recorded as", "are labeled")

GROUP = r"(?:customer )?(?:city|title|department|status|customer|industry|employee|project)"

INNER: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"\bwith (?:the )?status (?=\w)", tuple(f"{f} " for f in FLAGGED)),
    (r"\bhave the status (?=\w)", tuple(f"{f} " for f in ARE_FLAGGED)),
    (r"\b(?:without the status|with a status other than) (?=\w)", tuple(f"not {f} " for f in FLAGGED[:-1])),
    (r"\bdo not have the status (?=\w)", tuple(f.replace("are ", "are not ") + " " for f in ARE_FLAGGED)),
    (r"\bstaff members\b", ("team members", "personnel", "colleagues", "staff")),
    (r"\bclients\b", ("client firms", "buyers", "business customers")),
    (r"\bhired (?=in|after|before|between)", ("taken on ",)),
    (
        r"\bworked more than (\d+) hours on a project\b",
        (r"put more than \1 hours into a project", r"have over \1 project hours"),
    ),
)
"""What may be said otherwise inside a question: a pattern and its other wordings."""

WHOLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"^For each ([\w ]+?), what is (the .*)\?$",
        (
            r"For each \1, show \2.",
            r"Per \1, give me \2.",
            r"For all of the different \1 values, list \2.",
            r"By \1, what is \2?",
        ),
    ),
    (
        r"^For each ([\w ]+?), how many (.*) are there\?$",
        (r"For each \1, show how many \2 there are.", r"Per \1, give me the number of \2.", r"By \1, count the \2."),
    ),
    (
        rf"^(?:Show|List|Give me) (the .*) (?:for each|by|for every) ({GROUP})\.$",
        (r"For each \2, list \1.", r"Per \2, show \1.", r"Group \1 by \2.", r"Split \1 by \2."),
    ),
    (
        r"^(?:List|Show me|Show|Get|Find) (.*)\.$",
        (
            r"Could you find \1?",
            r"Print \1.",
            r"I need to see \1.",
            r"Return \1.",
            r"Let me see \1.",
            r"Would you show me \1?",
        ),
    ),
    (
        r"^What (?:is|are) (the .*)\?$",
        (r"Print \1.", r"I need \1.", r"Let me have \1.", r"Find out \1.", r"Could you give me \1?", r"Report \1."),
    ),
    (r"^(?:Which|What) (.*)\?$", (r"Let me know which \1.", r"Find out which \1.", r"Could you say which \1?")),
    (r"^How many (.*) are there\?$", (r"Let me know how many \1 there are.", r"Report how many \1 there are.")),
    (
        r"^Count (the .*)\.$",
        (r"Could you give me the count of \1?", r"I need a count of \1.", r"Print the number of \1."),
    ),
)
"""What may be said otherwise about a question as a whole; the first pattern that fits is used."""


def in_other_words(questions: Sequence[Question], seed: int) -> list[Question]:
    """The questions, about half of the parts that a rule fits to said otherwise."""
    rng = Random(seed)
    return [replace(q, question=_said(q.question, rng)) for q in questions]


def _said(text: str, rng: Random) -> str:
    for pattern, others in INNER:
        if re.search(pattern, text) and rng.random() < SHARE:
            text = re.sub(pattern, pick(rng, others), text)
    for pattern, others in WHOLE:
        if re.search(pattern, text):
            return re.sub(pattern, pick(rng, others), text) if rng.random() < SHARE else text
    return text
