"""What training refuses after loading is refused without weights, in the same words; what it takes is let through."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.plan.conftest import train_fitting
from veneer.cli.main import invoke
from veneer.errors import ConfigError, DiskError
from veneer.plan.alternatives import nearest
from veneer.plan.memory import Room, estimate
from veneer.plan.preflight import check_sound
from veneer.recipe.load import write_recipe
from veneer.recipe.overrides import with_changes
from veneer.recipe.settings import Recipe
from veneer.train.job import read_job, steps_of
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]
LATE = {
    "dense weights paged": {"memory.page_weights": True, "train.recompute": True},
    "a block that is not there": {"train.recompute": [0, 5]},
    "restarts after the end": {"restarts.every": 9},
    "no gradients kept, but added up": {"optimizer.in_backward": True, "train.micro_batch_tokens": 32},
    "bits that nothing takes": {"method": {"name": "ia3"}, "optimizer.bits": 8},
    "a ratio that nothing takes": {"method": {"name": "ia3"}, "optimizer.lr_ratio": 4.0},
    "rows longer than the model": {"train.max_length": 512, "prompt": {"name": "prefix", "tokens": 240}},
}


def refused(work: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as e:
        work()
    return str(e.value)


@pytest.mark.parametrize("changes", LATE.values(), ids=LATE)
def test_the_words_are_those_of_training(changes: dict[str, Any], recipe: Make, monkeypatch: Any) -> None:
    of = recipe(**changes)
    rows = read_job(of)
    by_plan = refused(lambda: check_sound(of, rows, steps_of(of, rows.examples)))
    assert by_plan == refused(lambda: train_recipe(of))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("veneer.train.setup.load_model", never)
    assert by_plan == refused(lambda: train_fitting(of))


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"memory.page_activations": True, "train.recompute": True}, "put the run on a disk"),
        ({"optimizer.paged": True}, "put the run on a disk"),
        (
            {"memory.page_weights": True, "train.recompute": True, "storage.name": "nf4"},
            "set VENEER_CACHE to a folder on a disk",
        ),
    ],
)
def test_paging_into_memory_is_refused(changes: Any, advice: str, recipe: Make, monkeypatch: Any) -> None:
    of = recipe(**changes)
    rows = read_job(of)
    check_sound(of, rows, order := steps_of(of, rows.examples))
    monkeypatch.setattr("veneer.disk.scratch.filesystem_of", lambda folder: "tmpfs")
    with pytest.raises(DiskError, match=f"is a tmpfs, which is in memory; {advice}"):
        check_sound(of, rows, order)
    with pytest.raises(DiskError, match=f"is a tmpfs, which is in memory; {advice}"):
        train_recipe(of)


def test_plan_is_status_2_for_them_and_for_an_encoder(recipe: Make, tmp_path: Any, capsys: Any) -> None:
    from transformers import BertConfig, BertModel

    file = tmp_path / "recipe.yaml"
    file.write_text(write_recipe(recipe(**LATE["restarts after the end"])))
    assert invoke(["plan", str(file), "--no-time"]) == 2
    assert "the first restart would come after step 9, but the run has 2" in capsys.readouterr().err
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=384, num_hidden_layers=2, **shape)).save_pretrained(tmp_path / "bert")
    file.write_text(write_recipe(recipe(model=str(tmp_path / "bert"))))
    assert invoke(["plan", str(file), "--no-time"]) == 2
    assert "BertModel is an encoder (its attention sees later tokens)" in capsys.readouterr().err


def test_no_change_is_offered_that_training_would_refuse(recipe: Make) -> None:
    of = recipe(
        **{
            "optimizer.in_backward": True,
            "train.tokens_per_step": 128,
            "train.micro_batch_tokens": None,
            "train.clip": 0.0,
        }
    )
    rows = read_job(of)
    order = steps_of(of, rows.examples)
    check_sound(of, rows, order)
    room = Room(estimate(of, rows, order, 0).peak_bytes - 1, 2**40, "this machine")
    fits = [with_changes(of, fit.changes) for fit in nearest(of, rows, room, 0)]
    assert fits
    for fit in fits:
        check_sound(fit, rows, steps_of(fit, rows.examples))
