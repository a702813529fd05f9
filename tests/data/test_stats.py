from veneer.data.sources import Row
from veneer.data.stats import complaint


def test_rows_of_one_reason_are_told_together() -> None:
    unusable = [(Row({}, "r.jsonl", n), "the text is empty") for n in range(1, 12)]
    unusable += [(Row({}, "r.jsonl", 20), "column 'a' is null")]
    assert complaint(unusable, 50) == (
        "r.jsonl: 12 of 50 rows cannot be trained on\n"
        "  lines 1, 2, 3, 4, 5, 6, 7, 8 and 3 more: the text is empty\n"
        "  line 20: column 'a' is null\n"
        "Correct or remove them, or say in the recipe how to read them."
    )


def test_many_reasons_are_cut_off() -> None:
    told = complaint([(Row({}, "r.jsonl", n), f"reason {n}") for n in range(1, 12)], 11)
    assert told.count("reason ") == 8
    assert "... and 3 more" in told
