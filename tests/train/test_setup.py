"""From a checked job to training: the base and its adapter."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import prepared
from veneer.kernels import native
from veneer.recipe.settings import Recipe

Make = Callable[..., Recipe]


def test_a_job(job: Make, rows: Path) -> None:
    said: list[str] = []
    recipe = job(**{"data.eval": str(rows), "data.eval_rows": 3})
    ready = prepared(recipe, said.append)
    assert ready.base.network is ready.adapter.model and ready.base.name == recipe.model
    assert said == [f"reading {rows}", f"loading {recipe.model}"]
    assert not any(d.training for d in ready.adapter.deltas.values())  # dropout off until a step turns it on
    assert ready.adapter.attached
    assert ready.adapter.base_name == recipe.model


def test_the_same_seed_starts_the_same_adapter(job: Make) -> None:
    a, b, c = (prepared(job(**{"train.seed": s})).adapter.parameters() for s in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({}, None),
        ({"optimizer.bits": 8}, "8-bit AdamW"),
        ({"optimizer.bits": 8, "storage": {"name": "int8"}}, "8-bit AdamW"),
        ({"optimizer.bits": 8, "storage": {"name": "nf4"}}, "with 4-bit weights"),
    ],
)
def test_a_missing_c_library_is_said_once_where_it_would_compute(
    settings: dict[str, object], what: str | None, job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "load", lambda: native.Status(False, None, None, "turned off"))
    said: list[str] = []
    prepared(job(**settings), said.append)
    lines = [line for line in said if "plain torch" in line]
    assert lines == ([] if what is None else [f"plain torch computes {what}, slower: turned off"])
