"""Names from elsewhere, and what is refused rather than read wrongly."""

from itertools import permutations
from typing import Any

import pytest
from pydantic import BaseModel

from veneer.recipe.aliases import (
    OTHER_MEANING,
    SAME_MEANING,
    SECTIONS,
    SHORTHANDS,
    as_init,
    canonical,
    inits,
    own_name,
    put,
)
from veneer.recipe.settings import Recipe
from veneer.recipe.validation import keys

OWN_SETTINGS = {
    "prompt.tokens",
    "method.rank",
    "method.alpha",
    "method.dropout",
    "method.init",
    "method.rank_stabilized",
} | {
    "method.rank_pattern",
    "method.alpha_pattern",
    "storage.double_quant",
}


def test_every_alias_names_a_key_and_hides_none() -> None:
    assert set(SAME_MEANING.values()) <= {*keys(), *OWN_SETTINGS}
    assert not {*SAME_MEANING, *OTHER_MEANING} & {*keys(), *SECTIONS}
    assert not set(SAME_MEANING) & set(OTHER_MEANING)


def test_sections_are_those_of_a_recipe() -> None:
    fields = {name: f.annotation for name, f in Recipe.model_fields.items()}
    assert set(SECTIONS) == {n for n, a in fields.items() if isinstance(a, type) and issubclass(a, BaseModel)}
    assert set(SHORTHANDS) <= set(SECTIONS)


PARTS = {
    "method": "lora",
    "lora_r": 4,
    "target_modules": ["q_proj"],
    "optimizer": {"name": "adamw"},
    "learning_rate": 1.0,
}


@pytest.mark.parametrize("order", list(permutations(PARTS)), ids=lambda order: ",".join(order))
def test_the_order_of_keys_does_not_matter(order: tuple[str, ...]) -> None:
    assert canonical({key: PARTS[key] for key in order}) == (
        {
            "method": {"name": "lora", "rank": 4, "targets": ["q_proj"]},
            "optimizer": {"name": "adamw", "lr": 1.0},
        },
        [],
    )


def test_a_section_an_alias_and_a_dotted_key_meet() -> None:
    given = {"train": {"steps": 5}, "max_seq_length": 7, "train.clip": 2}
    assert canonical(given) == ({"train": {"steps": 5, "max_length": 7, "clip": 2}}, [])


def test_given_twice_alike_is_fine_and_differently_is_not() -> None:
    assert canonical({"max_length": 7, "sequence_len": 7})[1] == []
    assert canonical({"train": {"max_length": 7}, "sequence_len": 8})[1] == [
        ("sequence_len", "train.max_length is given twice: 7, and 8 as sequence_len")
    ]


def test_all_problems_come_at_once() -> None:
    _, problems = canonical({"batch_size": 4, "steps": 5, "max_steps": 6, "gradient_accumulation_steps": 2})
    assert [key for key, _ in problems] == ["batch_size", "max_steps", "gradient_accumulation_steps"]
    assert problems[0][1] == (
        "batch_size: batches are counted in tokens here: set train.tokens_per_step (rows x their mean length)"
    )


@pytest.mark.parametrize("key", OTHER_MEANING)
def test_each_refusal_says_what_to_write(key: str) -> None:
    ((_, message),) = canonical({key: 1})[1]
    assert message.startswith(f"{key}: ")
    assert any(known in message for known in [*keys(), "`text`", "method.alpha"])


def test_adapter_is_a_methods_name_and_nothing_else() -> None:
    assert canonical({"adapter": "mora"})[0] == {"method": {"name": "mora"}}
    assert canonical({"adapter": {"r": 4}})[0] == {"adapter": {"r": 4}}
    assert own_name("adapter", {}) == "adapter"


def test_an_alias_into_what_is_no_section_is_a_problem() -> None:
    assert canonical({"train": 5, "max_steps": 6})[1] == [
        ("max_steps", "train.steps is given twice: train is 5, and 6 as max_steps")
    ]


@pytest.mark.parametrize("given", [{5: 1}, {None: 1}, {"train": {5: 1}}, {"method": {"a.b": 1}}, {True: {}}])
def test_odd_keys_are_left_for_the_types_to_refuse(given: dict[Any, Any]) -> None:
    assert canonical(given) == (given, [])


def test_put_outranks_only_when_told() -> None:
    tree: dict[str, Any] = {"train": {"steps": 1}}
    assert put(tree, "train.steps", 2) == "1"
    assert put(tree, "train.steps", 3, outrank=True) is None
    assert put(tree, "method.rank_pattern.q", 4) is None
    assert put(tree, "elsewhere.x", 5) is None
    assert tree == {"train": {"steps": 3}, "method": {"rank_pattern": {"q": 4}}, "elsewhere.x": 5}


SWITCHED = [
    ({"load_in_4bit": True}, {"storage": {"name": "nf4"}}),
    ({"load_in_8bit": True}, {"storage": {"name": "int8"}}),
    ({"load_in_4bit": False, "load_in_8bit": False}, {}),
    ({"load_in_4bit": True, "load_in_8bit": False}, {"storage": {"name": "nf4"}}),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, {"storage": {"name": "fp4"}}),
    ({"storage": {"name": "fp4"}, "load_in_4bit": True}, {"storage": {"name": "fp4"}}),
    ({"storage": "dense", "load_in_4bit": False}, {"storage": {"name": "dense"}}),
    ({"storage": "int8", "load_in_4bit": False}, {"storage": {"name": "int8"}}),
    (
        {"load_in_4bit": True, "bnb_4bit_use_double_quant": False},
        {"storage": {"double_quant": False, "name": "nf4"}},
    ),
]


@pytest.mark.parametrize(("given", "meant"), SWITCHED, ids=str)
def test_switches_of_quantization_name_a_storage(given: dict[str, Any], meant: dict[str, Any]) -> None:
    for order in permutations(given):
        assert canonical({key: given[key] for key in order}) == (meant, [])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"storage": "int8", "load_in_4bit": True}, "load_in_4bit is true, but storage.name is 'int8'"),
        ({"storage": "dense", "load_in_8bit": True}, "load_in_8bit is true, but storage.name is 'dense'"),
        (
            {"load_in_4bit": False, "bnb_4bit_quant_type": "nf4"},
            "load_in_4bit is false, but storage.name is 'nf4'",
        ),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit is true, but storage.name is 'nf4'"),
        ({"load_in_4bit": "yes"}, "load_in_4bit is 'yes', true or false is needed"),
    ],
    ids=str,
)
def test_switches_that_contradict_are_refused(given: dict[str, Any], problem: str) -> None:
    assert [message for _, message in canonical(given)[1]] == [problem]


OLD_METHODS = [
    ("pissa", {"name": "lora", "init": "pissa"}),
    (
        {"name": "pissa", "rank": 4, "iterations": 4},
        {"name": "lora", "rank": 4, "init": {"name": "pissa", "iterations": 4}},
    ),
    ({"name": "eva", "most": 3, "look": 64}, {"name": "lora", "init": {"name": "eva", "most": 3, "look": 64}}),
    ({"name": "eva", "init": "uniform"}, {"name": "lora", "init": "eva"}),
    ({"name": "pissa", "init": "pissa"}, {"name": "lora", "init": "pissa"}),
]


@pytest.mark.parametrize(("given", "meant"), OLD_METHODS, ids=str)
def test_a_method_that_is_an_init_now_is_written_as_one(given: Any, meant: dict[str, Any]) -> None:
    tree = canonical({"method": given})[0]
    assert inits(tree) == [] and tree == {"method": meant}
    again = canonical({"adapter": given} if isinstance(given, str) else {"method": given})[0]
    assert inits(again) == [] and again == tree
    assert inits(again) == [] and again == tree


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (True, "uniform"),
        (False, "random"),
        ("gaussian", "gaussian"),
        ("eva", "eva"),
        ("pissa_niter_16", {"name": "pissa", "iterations": 16}),
    ],
)
def test_pefts_init_is_written_canonically(given: Any, meant: Any) -> None:
    tree, problems = canonical({"method": "lora", "init_lora_weights": given})
    assert problems == [] == inits(tree)
    assert tree == {"method": {"name": "lora", "init": meant}}


def test_an_old_method_with_another_init_is_refused() -> None:
    tree = canonical({"method": {"name": "pissa", "init": "gaussian"}})[0]
    assert inits(tree) == [("method.init", "method pissa is lora with init pissa, but method.init is 'gaussian'")]


def test_settings_of_an_old_checkpoint() -> None:
    assert as_init("eva", {"rank": 2, "init": "uniform", "most": 2.0, "look": 9}) == (
        "lora",
        {"rank": 2, "init": {"name": "eva", "most": 2.0, "look": 9}},
    )
    assert as_init("dora", {"rank": 2, "init": "gaussian"}) == ("dora", {"rank": 2, "init": "gaussian"})


def test_memory_auto_is_a_key_of_the_section() -> None:
    assert canonical({"memory": "auto"}) == ({"memory": {"auto": True}}, [])
