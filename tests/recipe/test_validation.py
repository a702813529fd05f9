"""Findings in a recipe's words; what is found is tested with whole recipes in test_recipe.py."""

from pydantic import ValidationError

from veneer.recipe.settings import Recipe
from veneer.recipe.validation import boolean_problems, fields, keys, method_problems, takes, type_problems


def test_every_key_with_its_help() -> None:
    assert keys()["optimizer.lr"] == "Learning rate at the schedule's top."
    assert {"model", "run", "data.train", "method.targets", "train.clip", "storage.name"} <= set(keys())
    assert not {"data", "train", "method"} & set(keys())
    assert "\n" not in "".join(keys().values())


def test_what_may_stand_where() -> None:
    known = dict(fields(Recipe))
    assert takes(known["run"], str)
    assert not takes(known["run"], type(None))
    assert takes(known["data.eval"], type(None))
    assert takes(known["method.targets"], tuple[str, ...])
    assert not takes(known["train.steps"], str)
    assert not takes(None, str)


def test_truths_are_no_numbers() -> None:
    settings = {"train": {"steps": True, "recompute": True}, "data": {"rows": False, "packing": False}, "optimizer": 5}
    assert [key for key, _ in boolean_problems(settings)] == ["data.rows", "train.steps"]


def test_a_method_speaks_of_its_settings() -> None:
    assert method_problems({"method": {"name": "lora", "rank": 4}}) == []
    assert method_problems({"method": {"name": 4}}) == []  # the types have said so
    ((key, message),) = method_problems({"method": {"rank": -1}})
    assert (key, "at least 1" in message) == ("method.rank", True)


def test_a_union_is_one_key() -> None:
    try:
        Recipe.model_validate({"model": "m", "run": "r", "data": {"train": "x"}, "method": {"targets": 4}})
    except ValidationError as error:
        assert {key for key, _ in type_problems(error, set(keys()))} == {"method.targets"}
