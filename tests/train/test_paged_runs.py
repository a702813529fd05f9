"""Whole runs with paged weights and activations: the adapter's bytes are those of the run in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.disk import readahead
from veneer.errors import ConfigError, DiskError
from veneer.recipe.settings import Recipe
from veneer.train.events import Event
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]
BOTH = {"page_weights": True, "page_activations": True}


@pytest.fixture(scope="module")
def base(made_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 blocks, twice as many as there are buffers."""
    folder = tmp_path_factory.mktemp("paged") / "base"
    return made_model(folder, num_hidden_layers=6, hidden_size=128, intermediate_size=256)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VENEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def adapter_of(recipe: Recipe) -> bytes:
    outcome, _ = train_recipe(recipe)
    return Path(outcome.adapter, "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("storage", "method"),
    [("nf4", "lora"), ("fp4", "lora"), ("int8", "lora"), ("nf4", "dora"), ("nf4", "mora"), ("nf4", "ia3")],
)
def test_the_adapter_is_the_same(job: Make, base: Path, storage: str, method: str) -> None:
    dropout = {"dropout": 0.2} if method in ("lora", "dora") else {}
    given: dict[str, Any] = {"model": str(base), "storage": storage, "method": {"name": method, **dropout}}
    given |= {"train.steps": 2, "train.recompute": True}
    assert adapter_of(job("paged", **given, memory=BOTH)) == adapter_of(job("plain", **given))


def test_an_interrupted_run_goes_on_to_the_same_bytes(job: Make, base: Path, rows: Path) -> None:
    given: dict[str, Any] = {"model": str(base), "storage": "nf4", "train.recompute": True, "data.eval": str(rows)}
    given |= {"train.checkpoint_every": 2, "train.eval_every": 2}
    whole = adapter_of(job("plain", **given))

    def stop(event: Event) -> None:
        if event.step == 3:
            raise RuntimeError("stop")

    recipe = job("paged", **given, memory=BOTH)
    with pytest.raises(RuntimeError, match="stop"):
        train_recipe(recipe, [stop])
    outcome, _ = train_recipe(recipe)
    assert outcome.resumed_from == 2
    assert Path(outcome.adapter, "adapter_model.safetensors").read_bytes() == whole


def test_a_file_that_cannot_be_read_ends_the_run_by_name(
    job: Make, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = readahead._File.read
    left = iter(range(40))

    def failing(self: Any, *args: Any) -> None:
        if next(left, None) is None:
            raise DiskError(f"{self.path} cannot be read: Input/output error")
        real(self, *args)

    monkeypatch.setattr(readahead._File, "read", failing)
    recipe = job(model=str(base), storage="nf4", memory=BOTH, **{"train.recompute": True})
    with pytest.raises(DiskError, match=r"model\.safetensors cannot be read: Input/output error"):
        train_recipe(recipe)


def test_dense_weights_are_refused(job: Make) -> None:
    with pytest.raises(ConfigError, match="is dense; set storage"):
        train_recipe(job(memory={"page_weights": True}, **{"train.recompute": True}))
