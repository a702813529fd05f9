"""Defaults, ranges and pairs of settings that exclude each other."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from veneer.data.settings import DataSettings
from veneer.recipe.settings import MethodSettings, OptimizerSettings, Recipe, StorageSettings, TrainSettings


def test_every_setting_says_what_it_is() -> None:
    for model in (Recipe, DataSettings, StorageSettings, MethodSettings, OptimizerSettings, TrainSettings):
        assert issubclass(model, BaseModel)
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no help text"


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        (TrainSettings, {"steps": 0}),
        (TrainSettings, {"steps": 1.5}),
        (TrainSettings, {"epochs": 0}),
        (TrainSettings, {"epochs": float("inf")}),
        (TrainSettings, {"epochs": float("nan")}),
        (TrainSettings, {"steps": 3, "epochs": 1}),
        (TrainSettings, {"tokens_per_step": 0}),
        (TrainSettings, {"micro_batch_tokens": 0}),
        (TrainSettings, {"max_length": 1}),
        (TrainSettings, {"schedule": "step"}),
        (TrainSettings, {"warmup": -1}),
        (TrainSettings, {"clip": float("inf")}),
        (TrainSettings, {"keep_checkpoints": 0}),
        (TrainSettings, {"dtype": "float16"}),
        (TrainSettings, {"seed": -1}),
        (TrainSettings, {"seed": 2**63}),
        (TrainSettings, {"unknown": 1}),
        (OptimizerSettings, {"lr": 0}),
        (OptimizerSettings, {"lr": float("inf")}),
        (OptimizerSettings, {"betas": (0.9, 1.0)}),
        (OptimizerSettings, {"betas": (-0.1, 0.9)}),
        (OptimizerSettings, {"betas": (0.9,)}),
        (OptimizerSettings, {"eps": 0}),
        (OptimizerSettings, {"lr_ratio": 0}),
        (StorageSettings, {"head": "perhaps"}),
        (MethodSettings, {"layers": "all"}),
    ],
)
def test_out_of_range(section: type[BaseModel], wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        section.model_validate(wrong)


def test_the_largest_seed_seeds() -> None:
    import torch

    torch.Generator().manual_seed(TrainSettings(seed=2**63 - 1).seed)


def test_measuring_every_few_steps_needs_rows_to_measure_on() -> None:
    given: dict[str, Any] = {"model": "m", "run": "r", "data": {"train": "x.jsonl"}, "train": {"eval_every": 5}}
    with pytest.raises(ValidationError, match=r"train.eval_every is 5, but data.eval names no rows"):
        Recipe.model_validate(given)
    given["data"]["eval"] = "y.jsonl"
    assert Recipe.model_validate(given).train.eval_every == 5


def test_what_a_method_has_of_its_own() -> None:
    assert MethodSettings.model_validate({"name": "lora", "rank": 3, "exclude": "x"}).own == {"rank": 3}


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrainSettings().steps = 3  # type: ignore[misc]
