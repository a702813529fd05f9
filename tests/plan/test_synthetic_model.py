"""The made model has the shapes of the real one, real numbers everywhere, and passes a gradient down to its input."""

from collections.abc import Callable

import pytest
import torch

from veneer.base.load import load_model
from veneer.base.storage_config import base_storage
from veneer.models.blocks import blocks_of
from veneer.plan.meta_model import Plain
from veneer.plan.synthetic_model import made_model
from veneer.recipe.settings import Recipe

Make = Callable[..., Recipe]


@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
def test_shapes_are_those_of_the_loaded_model(storage: str, recipe: Make) -> None:
    wanted = recipe(**{"storage.name": storage})
    model = made_model(Plain.of(wanted))
    real = load_model(wanted.model, storage=base_storage(wanted.storage.model_dump()), dtype="float32").network
    shapes, wanted_shapes = (
        {n: (t.shape, t.dtype) for n, t in [*m.named_parameters(), *m.named_buffers()]} for m in (model, real)
    )
    assert shapes == wanted_shapes
    assert not any(t.is_meta or t.requires_grad for t in [*model.parameters(), *model.buffers()])
    with torch.no_grad():
        logits = model(torch.arange(8)[None]).logits
    assert bool(logits.isfinite().all()) and float(logits.std()) > 0.01


def test_tied_weights_stay_one(recipe: Make) -> None:
    model = made_model(Plain.of(recipe()))
    tied = load_model(recipe().model, storage=None, dtype="float32").network
    same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert same == (tied.get_input_embeddings().weight is tied.get_output_embeddings().weight)


def test_the_first_block_differentiates_its_input(recipe: Make) -> None:
    model = made_model(Plain.of(recipe()))
    inputs: list[torch.Tensor] = []
    next(iter(blocks_of(model).values())).register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(torch.arange(8)[None]).logits.sum().backward()
    assert inputs[0].grad is not None and float(inputs[0].grad.abs().sum()) > 0
