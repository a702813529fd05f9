"""The sentences around a condition: how a list, a count, an average, a group or a top row is asked for.

Slots: {np} a noun with its conditions, {np1} the same in the singular, {noun} {vp} the same as subject and verb, {of}
"of" and {np}, {label} names or ids, {who} Who or What, {k} and {n} numbers, {v} and {w} the things looked up; a plan's
`words` fill the others.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """Ways to say one thing: those that training sees, and those of held-out questions only."""

    seen: tuple[str, ...]
    held: tuple[str, ...] = ()


FRAMES = {
    "list": Words(
        (
            "List the {np}.",
            "Show all {np}.",
            "Show me the {np}.",
            "Find all {np}.",
            "Give me the {label} of all {np}.",
            "What are the {label} of the {np}?",
            "Get the {label} of the {np}.",
            "Which {noun} {vp}?",
            "What {noun} {vp}?",
            "Show which {noun} {vp}.",
        ),
        (
            "Can you list the {np}?",
            "Please show the {label} of the {np}.",
            "I would like to see all {np}.",
            "Display the {np}.",
            "Tell me which {noun} {vp}.",
            "Do you know which {noun} {vp}?",
        ),
    ),
    "list with attribute": Words(
        (
            "List the {label} and {extra} of the {np}.",
            "Show the {label} and {extra} of all {np}.",
            "What are the {label} and {extra} of the {np}?",
            "Give me the {label} and {extra} of the {np}.",
        ),
        (
            "Can you list the {label} and {extra} of the {np}?",
            "Please show the {label} and {extra} of all {np}.",
            "Display the {label} and {extra} of the {np}.",
        ),
    ),
    "count": Words(
        (
            "How many {np} are there?",
            "Count the {np}.",
            "What is the number of {np}?",
            "Give me the number of {np}.",
            "Show how many {np} there are.",
            "How many {noun} {vp}?",
            "How many of the {noun} {vp}?",
        ),
        (
            "Tell me how many {np} there are.",
            "Can you count the {np}?",
            "Can you say how many {np} there are?",
            "I want to know how many {noun} {vp}.",
            "Do you know how many {noun} {vp}?",
        ),
    ),
    "aggregate": Words(
        (
            "What is the {f} {m} {of}?",
            "Show the {f} {m} {of}.",
            "Find the {f} {m} {of}.",
            "Give me the {f} {m} {of}.",
            "Calculate the {f} {m} {of}.",
        ),
        (
            "Can you tell me the {f} {m} {of}?",
            "I want to know the {f} {m} {of}.",
            "Work out the {f} {m} {of}.",
            "Please compute the {f} {m} {of}.",
        ),
    ),
    "aggregate per group": Words(
        (
            "What is the {f} {m} {of} per {g}?",
            "Show the {f} {m} {of} for each {g}.",
            "List the {f} {m} {of} by {g}.",
            "Give me the {f} {m} {of} for every {g}.",
            "For each {g}, what is the {f} {m} {of}?",
        ),
        (
            "Can you show the {f} {m} {of} per {g}?",
            "Tell me the {f} {m} {of} for each {g}.",
            "For every {g}, show the {f} {m} {of}.",
            "Break down the {f} {m} {of} by {g}.",
        ),
    ),
    "count per group": Words(
        (
            "How many {np} are there per {g}?",
            "What is the number of {np} per {g}?",
            "Count the {np} for each {g}.",
            "Show the number of {np} by {g}.",
            "For each {g}, how many {np} are there?",
        ),
        (
            "Tell me how many {np} there are per {g}.",
            "Can you count the {np} by {g}?",
            "For every {g}, show the number of {np}.",
            "Break down the number of {np} by {g}.",
        ),
    ),
    "groups by count": Words(
        (
            "Which {gs} have {more} than {n} {np}?",
            "List the {gs} with {more} than {n} {np}.",
            "Show all {gs} that have {more} than {n} {np}.",
            "Find the {gs} with {more} than {n} {np}.",
        ),
        (
            "Tell me which {gs} have {more} than {n} {np}.",
            "Can you list the {gs} with {more} than {n} {np}?",
            "Display the {gs} that have {more} than {n} {np}.",
        ),
    ),
    "groups by aggregate": Words(
        (
            "Which {gs} have {value} {above} {n}?",
            "List the {gs} with {value} {above} {n}.",
            "Show all {gs} that have {value} {above} {n}.",
            "Find the {gs} with {value} {above} {n}.",
        ),
        (
            "Tell me which {gs} have {value} {above} {n}.",
            "Can you list the {gs} with {value} {above} {n}?",
            "Display the {gs} that have {value} {above} {n}.",
        ),
    ),
    "top": Words(
        (
            "{who} are the {k} {best} {np}?",
            "List the {k} {best} {np}.",
            "Show the {k} {best} {np}.",
            "Give me the {k} {best} {np}.",
        ),
        (
            "Can you name the {k} {best} {np}?",
            "Please list the {k} {best} {np}.",
            "Tell me the {k} {best} {np}.",
        ),
    ),
    "top one": Words(
        (
            "{who} is the {best} {np1}?",
            "Show the {best} {np1}.",
            "Give me the {best} {np1}.",
            "Find the {best} {np1}.",
        ),
        (
            "Can you name the {best} {np1}?",
            "Please show the {best} {np1}.",
            "Tell me the {best} {np1}.",
        ),
    ),
    "top by value": Words(
        (
            "Which {k} {np} have the {most} {m}?",
            "What {k} {np} have the {most} {m}?",
            "Show which {k} {np} have the {most} {m}.",
        ),
        (
            "Tell me which {k} {np} have the {most} {m}.",
            "Do you know which {k} {np} have the {most} {m}?",
        ),
    ),
    "top one by value": Words(
        (
            "Which {np1} has the {most} {m}?",
            "What {np1} has the {most} {m}?",
            "Show which {np1} has the {most} {m}.",
        ),
        (
            "Tell me which {np1} has the {most} {m}.",
            "Do you know which {np1} has the {most} {m}?",
        ),
    ),
    "top groups by count": Words(
        (
            "Which {k} {gs} have the most {np}?",
            "List the {k} {gs} with the most {np}.",
            "Show the {k} {gs} with the most {np}.",
        ),
        (
            "Tell me which {k} {gs} have the most {np}.",
            "Can you name the {k} {gs} with the most {np}?",
        ),
    ),
    "top group by count": Words(
        ("Which {g} has the most {np}?", "Show the {g} with the most {np}.", "Find the {g} with the most {np}."),
        ("Tell me which {g} has the most {np}.", "Can you name the {g} with the most {np}?"),
    ),
    "top groups by aggregate": Words(
        (
            "Which {k} {gs} have the {most} {f} {m} {of}?",
            "List the {k} {gs} with the {most} {f} {m} {of}.",
            "Show the {k} {gs} with the {most} {f} {m} {of}.",
        ),
        (
            "Tell me which {k} {gs} have the {most} {f} {m} {of}.",
            "Can you name the {k} {gs} with the {most} {f} {m} {of}?",
        ),
    ),
    "top group by aggregate": Words(
        (
            "Which {g} has the {most} {f} {m} {of}?",
            "Show the {g} with the {most} {f} {m} {of}.",
            "Find the {g} with the {most} {f} {m} {of}.",
        ),
        (
            "Tell me which {g} has the {most} {f} {m} {of}.",
            "Can you name the {g} with the {most} {f} {m} {of}?",
        ),
    ),
    "different": Words(
        (
            "Which different {gs} do the {np} have?",
            "List the different {gs} of the {np}.",
            "Show all different {gs} of the {np}.",
            "What are the distinct {gs} of the {np}?",
            "Find the distinct {gs} of the {np}.",
        ),
        (
            "Can you list the different {gs} of the {np}?",
            "Tell me the distinct {gs} of the {np}.",
            "Display all distinct {gs} of the {np}.",
        ),
    ),
    "count different": Words(
        (
            "How many different {gs} do the {np} have?",
            "Count the different {gs} of the {np}.",
            "What is the number of distinct {gs} of the {np}?",
            "Show the number of different {gs} of the {np}.",
        ),
        (
            "Tell me how many different {gs} the {np} have.",
            "Can you count the different {gs} of the {np}?",
            "I want to know the number of distinct {gs} of the {np}.",
        ),
    ),
    "look up": Words(
        ("What is the {m} of {v}?", "Show the {m} of {v}.", "Give me the {m} of {v}.", "What is {v}'s {m}?"),
        ("Can you tell me the {m} of {v}?", "Look up the {m} of {v}.", "I need the {m} of {v}.", "Tell me {v}'s {m}."),
    ),
    "handler": Words(()),
    "hours": Words(
        (
            "How many hours did {v} work on project {w}?",
            "How many hours did {v} spend on project {w}?",
            "Show the hours of {v} on project {w}.",
            "What are the hours of {v} on project {w}?",
        ),
        (
            "Tell me how many hours {v} worked on project {w}.",
            "Look up the hours of {v} on project {w}.",
            "Can you show the hours of {v} on project {w}?",
        ),
    ),
}
