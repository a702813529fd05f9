"""Restarts in a run: what they fold, keep, prune and report; exact after any interruption; one adapter of the base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import mean_loss
from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import load_adapter
from veneer.base.load import load_model
from veneer.base.storage_config import base_storage
from veneer.errors import ConfigError
from veneer.recipe.settings import Recipe, RestartSettings
from veneer.train.events import Event
from veneer.train.job import read_job
from veneer.train.preflight import preflight
from veneer.train.restarts import restart_steps
from veneer.train.run import open_run, train_recipe
from veneer.train.setup import set_up

Make = Callable[..., Recipe]
EVERY_2 = {"every": 2, "warmup": 1}


def restarts_of(recipe: Recipe) -> list[dict[str, Any]]:
    lines = (Path(recipe.run) / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == "restart"]


def update_of(adapter: Adapter, path: str) -> torch.Tensor:
    w = adapter.model.get_submodule(path).weight.detach().double()
    return adapter.deltas[path].fold(w).detach() - w


FORMS: dict[str, dict[str, Any]] = {
    "lora": {"r": 6},
    "dora": {"r": 6, "use_dora": True},
    "pissa": {"r": 12},
    "mora": {"peft_type": "REMORA", "r": 2, "mora_type": 3, "mora_finished_types": [1, 2]},
}
"""What the configuration of an adapter of rank 2 says after two restarts."""


def of(method: str, **settings: Any) -> dict[str, Any]:
    own = {"mora": {"variant": "sharing"}, "pissa": {"name": "lora", "init": "pissa"}}
    return {"name": method, "rank": 2, **own.get(method, {}), **settings}


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("fold", ["weight", "beside"])
def test_what_is_saved_is_what_was_trained(job: Make, rows: Path, method: str, fold: str) -> None:
    """On the unchanged base, in a folder of the method's own."""
    settings = of(method, targets=["q_proj", "down_proj"])
    recipe = job(method=settings, restarts={**EVERY_2, "fold": fold}, **{"data.eval": str(rows)})
    outcome, done = train_recipe(recipe)
    assert done is not None
    assert [(e["step"], e["cycle"]) for e in restarts_of(recipe)] == [(2, 2), (4, 3)]
    fresh = load_model(recipe.model, dtype="float32").network
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), done.base.network.parameters(), strict=True))
    adapter = load_adapter(fresh, outcome.adapter)
    config = json.loads((Path(outcome.adapter) / "adapter_config.json").read_text())
    want = {"peft_type": "LORA", **FORMS[method]}
    assert {k: config[k] for k in want} == want
    assert mean_loss(fresh, done.job.held_out, recipe) == pytest.approx(outcome.eval_loss, abs=2e-6)
    for path, delta in done.adapter.deltas.items():
        w = fresh.get_submodule(path).weight.detach()
        assert torch.allclose(adapter.deltas[path].fold(w), delta.fold(w), atol=1e-6)


@pytest.mark.parametrize(
    ("method", "want"),
    [("lora", [4, 6, 8]), ("mora", [21, 21, 21])],
)
def test_the_summed_change_outgrows_the_rank(job: Make, method: str, want: list[int]) -> None:
    """LoRA's at each restart; the square of side 11's with the second grouping, to all that the two of them reach."""
    ranks = []
    for steps in (3, 5, 7):
        recipe = job(f"run-{steps}", method=of(method), restarts=EVERY_2, **{"train.steps": steps})
        _, done = train_recipe(recipe)
        assert done is not None
        ranks.append(
            int(torch.linalg.matrix_rank(update_of(done.adapter, "model.layers.0.self_attn.q_proj"), rtol=1e-5))
        )
    assert ranks == want


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["lora", "dora", "mora"])
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(job: Make, method: str, storage: str) -> None:
    def make(run: str) -> Recipe:
        return job(
            run,
            method=of(method, targets=["q_proj"], dropout=0.2),
            storage=storage,
            restarts={"every": 2, "first": 3, "warmup": 2, "reset": "random", "keep": 0.5},
            **{"train.steps": 8, "train.checkpoint_every": 1},
        )

    whole = make("whole")
    train_recipe(whole)
    broken = make("broken")
    for at in [("step", 2), ("step", 3), ("restart", 3), ("step", 4), ("restart", 5), ("step", 7)]:

        def kill(event: Event, at: tuple[str, int] = at) -> None:
            if (event.kind, event.step) == at:
                raise Killed

        with pytest.raises(Killed):
            train_recipe(broken, [kill])
    train_recipe(broken)
    one, other = (Path(r.run) / "adapter" / "adapter_model.safetensors" for r in (whole, broken))
    assert one.read_bytes() == other.read_bytes()
    assert [e["step"] for e in restarts_of(broken)] == [3, 5, 7]
    figures = ("pruned", "rounding", "rounding_of_change", "cycle")
    assert [[e[f] for f in figures] for e in restarts_of(broken)] == [
        [e[f] for f in figures] for e in restarts_of(whole)
    ]


@pytest.mark.parametrize(("storage", "folded"), [("dense", True), ("nf4", False), ("int8", False)])
def test_only_dense_weights_take_the_change_in(job: Make, storage: str, folded: bool) -> None:
    recipe = job(storage=storage, method={"name": "lora", "rank": 2}, restarts=EVERY_2)
    outcome, done = train_recipe(recipe)
    assert done is not None
    assert [bool(e["folded"]) for e in restarts_of(recipe)] == [folded, folded]
    for event in restarts_of(recipe):
        assert event["rounding"] == event["rounding_of_change"] == 0  # float32 holds what is computed in float32
    fresh = load_model(recipe.model, storage=base_storage(storage), dtype="float32").network
    load_adapter(fresh, outcome.adapter)  # its fingerprint is the base's


def test_in_bfloat16_rounding_is_bounded_and_does_not_add_up(job: Make) -> None:
    recipe = job(restarts={"every": 1, "warmup": 0}, **{"train.dtype": "bfloat16", "train.steps": 8, "train.warmup": 0})
    train_recipe(recipe)
    found = [e["rounding"] for e in restarts_of(recipe)]
    assert len(found) == 7
    assert all(0 < f <= 2**-9 for f in found)
    assert found[-1] < 1.05 * found[0]


def test_a_step_after_a_restart_is_made_from_the_folded_weights(job: Make, rows: Path) -> None:
    """With the past in the weights and beside them the run is the same but for rounding."""
    losses = []
    for fold in ("weight", "beside"):
        recipe = job(fold, restarts={**EVERY_2, "fold": fold}, **{"data.eval": str(rows), "train.eval_every": 1})
        told: list[Event] = []
        train_recipe(recipe, [told.append])
        losses.append([e.figures["loss"] for e in told if e.kind != "restart"])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_after_a_restart_the_model_says_what_it_said_before(job: Make, rows: Path) -> None:
    recipe = job(restarts={**EVERY_2, "fold": "beside"}, **{"data.eval": str(rows), "train.eval_every": 2})
    losses: dict[str, float] = {}

    def listen(event: Event) -> None:
        if event.kind == "evaluation":
            losses["before"] = event.figures["loss"]
        elif event.kind == "restart":
            losses[f"after {event.step}"] = mean_loss(model, held_out, recipe)
            assert losses[f"after {event.step}"] == pytest.approx(losses["before"], abs=2e-6)

    with open_run(recipe) as session:
        training = set_up(preflight(read_job(session.recipe)))
        model, held_out = training.base.network, training.job.held_out
        session.train(training, [listen])
    assert {"after 2", "after 4"} <= losses.keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"restarts": {"every": 6}}, r"first restart would come after step 6, but the run has 6"),
        (
            {"restarts": {"every": 2}, "train.warmup": 3},
            r"after step 2, would come within the 3 steps of train\.warmup",
        ),
        ({"restarts": {"every": 2, "fold": "weight"}, "storage": "nf4"}, r"it is kept as NF4, which has no room"),
    ],
)
def test_restarts_that_do_not_fit_the_run_are_refused(job: Make, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        train_recipe(job(**changes))


def test_steps_of_restarts() -> None:
    assert restart_steps(RestartSettings(every=3), 9) == [3, 6]
    assert restart_steps(RestartSettings(every=3, first=1), 9) == [1, 4, 7]
    assert restart_steps(RestartSettings(), 9) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "bottleneck"}, "bottleneck cannot be restarted: a restart folds the change into a weight"),
        ({"method": "bitfit"}, "bitfit gains nothing from restarts"),
        ({"method": "adalora"}, "adalora gains nothing from restarts"),
        ({"method": "none", "prompt": "prefix"}, "a prompt alone is no change of a weight that could be folded"),
        ({"method": "full"}, "full gains nothing from restarts"),
        ({"method": {"name": "mora"}}, "mora.variant rotation gains nothing from restarts.*use variant sharing"),
        ({"method": {"name": "mora", "variant": "sharing", "groupings": 1}}, "mora.groupings 1 gains nothing"),
        ({"method": {"name": "lora", "init": "random"}}, "lora.init random starts with a change of the model"),
        ({"restarts": {"warmup": 3}}, "restarts.warmup is given, but there are no restarts: set restarts.every"),
        ({"restarts": {"every": 3, "keep": 0.5}}, "restarts.keep belongs to reset random and magnitude"),
        ({"restarts": {"every": 3, "warmup": 4}}, r"restarts.warmup 4 is longer than a cycle \(restarts.every 3\)"),
        ({"restarts": {"every": 3, "reset": "random", "keep": 1}}, "restarts.keep is 1: input should be less than 1"),
        ({"restarts": {"every": 3, "reset": "prune"}}, "restarts.reset is 'prune': input should be 'zero'"),
        ({"train.schedule": "constant", "train.floor": 0.1}, "schedule constant does not fall"),
        ({"relora_prune_ratio": 0.9}, "set restarts.keep to what is left"),
    ],
)
def test_a_recipe_with_wrong_restarts_is_refused(job: Make, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job(**{"restarts": {"every": 2}, **changes})
