"""Preflight finds what is wrong with a recipe from config.json and the rows, before any weight is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.conftest import copy_headers, prepared
from veneer.base.device import Device
from veneer.cli.main import invoke
from veneer.errors import ConfigError, DiskError, ModelError, TargetError
from veneer.methods.base import METHODS
from veneer.models import skeleton
from veneer.recipe.load import write_recipe
from veneer.recipe.settings import Recipe
from veneer.train.checkpoint import init_state_in
from veneer.train.job import read_job
from veneer.train.preflight import Checked, preflight
from veneer.train.run import train_recipe
from veneer.train.setup import set_up

Make = Callable[..., Recipe]
SMALL = {"vocab_size": 384, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}


def checked(recipe: Recipe) -> Checked:
    return preflight(read_job(recipe))


@pytest.fixture
def bare(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model without its weights."""
    return copy_headers(tiny_model, tmp_path / "bare")


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"method": {"name": "lora", "targets": ["q_prj"]}}, TargetError, "Did you mean 'q_proj'"),
        ({"method": {"name": "lora", "rank_pattern": {"x_proj": 2}}}, ConfigError, "fits no target"),
        ({"method": {"name": "lora", "init": "pissa", "rank": 17}}, ConfigError, "lora.rank 17 is above 16"),
        ({"method": {"name": "ia3", "targets": ["embed_tokens"]}}, TargetError, "changes layers of kind conv, linear"),
        ({"memory.page_weights": True, "train.recompute": True}, ConfigError, "memory.page_weights reads weights"),
        ({"train.recompute": [0, 5]}, ConfigError, "there is no block 5"),
        ({"restarts.every": 9}, ConfigError, "the first restart would come after step 9, but the run has 6"),
        ({"optimizer.in_backward": True, "train.micro_batch_tokens": 32}, ConfigError, "keeps no gradients"),
        ({"method": {"name": "ia3"}, "optimizer.bits": 8}, ConfigError, "optimizer.bits is 8, but"),
        ({"method": {"name": "ia3"}, "optimizer.lr_ratio": 4.0}, ConfigError, "optimizer.lr_ratio is 4.0, but"),
        ({"prompt": {"name": "prefix", "tokens": 250}}, ConfigError, r"and 250 of the prompt in front, but the model"),
    ],
)
def test_refused_without_weights(job: Make, bare: Path, changes: dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        checked(job(model=str(bare), **changes))


def test_state_is_paged_from_the_cpu_alone(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(job(**{"optimizer.paged": True}))
    monkeypatch.setattr("veneer.train.preflight.find_device", lambda word: Device(torch.device("cuda")))
    with pytest.raises(ConfigError, match=r"optimizer\.paged is true, but only the CPU's memory is paged, .* on cuda"):
        checked(job(**{"optimizer.paged": True}))


def test_a_row_longer_than_the_model_reads(job: Make, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    lines = [{"prompt": "a", "completion": "b"}, {"prompt": "count " * 300, "completion": "b"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        ConfigError, match=rf"{path}:2 has \d+ tokens, but the model reads at most 256; set train.max_length"
    ):
        checked(job(**{"data": {"train": str(path)}, "train.max_length": 2048}))
    made = checked(job(**{"data": {"train": str(path)}, "train.max_length": 256}))
    assert max(map(len, made.job.examples)) == 256


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
def test_paging_into_memory_is_refused(changes: Any, advice: str, job: Make, monkeypatch: Any) -> None:
    of = job(**changes)
    checked(of)
    monkeypatch.setattr("veneer.disk.scratch.filesystem_of", lambda folder: "tmpfs")
    with pytest.raises(DiskError, match=f"is a tmpfs, which is in memory; {advice}"):
        checked(of)


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "gpt2", "vocab_size": 384, "n_embd": 32, "n_head": 4, "n_layer": 1},
        {"model_type": "bloom", "vocab_size": 384, "hidden_size": 32, "n_head": 4, "n_layer": 1},  # notes nothing
        {"model_type": "mamba", "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1},  # has no attention
        {"model_type": "bert", **SMALL, "is_decoder": True},
        {"model_type": "bert", **SMALL},
        {"model_type": "roberta", **SMALL},
    ],
    ids=lambda a: a["model_type"] + " as a decoder" * a.get("is_decoder", False),
)
def test_an_encoder_lets_a_later_token_change_an_earlier_one(
    job: Make, bare: Path, architecture: dict[str, Any]
) -> None:
    rows = read_job(job())
    (bare / "config.json").write_text(json.dumps(architecture))
    recipe, model = job(model=str(bare)), AutoModel.from_config(AutoConfig.from_pretrained(bare)).eval()
    first, second = (model(torch.tensor([[5, 6, 7, last]])).last_hidden_state for last in (8, 9))
    if torch.equal(first[:, :3], second[:, :3]):
        preflight(rows.with_recipe(recipe))
        return
    with pytest.raises(
        ModelError, match=r"method lora cannot be trained on .* is an encoder \(its attention sees later"
    ):
        preflight(rows.with_recipe(recipe))


def test_a_model_without_a_head(job: Make, bare: Path) -> None:
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    with pytest.raises(ModelError, match=r"LlamaModel is an encoder \(it has no output head\)"):
        checked(job(model=str(bare)))


def test_plan_is_status_2_for_what_is_wrong(job: Make, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(write_recipe(job(**{"restarts.every": 9})))
    assert invoke(["plan", str(file), "--no-time"]) == 2
    assert "the first restart would come after step 9, but the run has 6" in capsys.readouterr().err


@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize(
    "method",
    [{"name": n} for n in METHODS if n not in ("full", "bitfit")] + [{"name": "lora", "init": "pissa"}],
    ids=str,
)
def test_the_adapter_on_the_meta_device_is_that_of_training(method: dict[str, str], storage: str, job: Make) -> None:
    own = {"rank": 4} if method["name"] == "mora" else {}
    made = checked(job(method={**method, **own}, **{"storage.name": storage}))
    real = prepared(made.recipe).adapter
    found, wanted = ({(n.path, n.name): n.parameter.shape for n in a.named()} for a in (made.adapter, real))
    assert found == wanted
    assert all(p.is_meta for p in made.adapter.parameters()) and not made.adapter.attached


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("method", ["none", "lora"])
def test_prompts_on_the_meta_device(kind: str, method: str, job: Make) -> None:
    made = checked(job(prompt={"name": kind, "tokens": 3}, method={"name": method}))
    assert made.adapter.n_params() == prepared(made.recipe).adapter.n_params() and not made.adapter.attached


def test_a_resumed_run_has_the_adapter_it_began_with(job: Make) -> None:
    class Stopped(Exception):
        pass

    def stop(event: Any) -> None:
        if event.step == 2:
            raise Stopped

    of = job(method={"name": "lora", "init": "eva", "rank": 2}, **{"train.checkpoint_every": 1})
    with pytest.raises(Stopped):
        train_recipe(of, [stop])
    begun = init_state_in(Path(of.run) / "checkpoints" / "step-1")
    assert begun is not None
    resumed = preflight(read_job(of), begun)
    real = set_up(resumed, begun).adapter
    assert {n.path: n.parameter.shape for n in resumed.adapter.named()} == {
        n.path: n.parameter.shape for n in real.named()
    }


def test_a_model_that_cannot_be_traced_passes_and_its_adapter_says_why(job: Make, monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("needs values")

    monkeypatch.setattr("veneer.train.preflight.attach", broken)
    made = checked(job())
    with pytest.raises(ModelError, match=r"cannot be traced .* \(RuntimeError: needs values\)"):
        made.adapter  # noqa: B018
    with pytest.raises(ConfigError, match="there is no block 5"):  # other checks are made all the same
        checked(job(**{"train.recompute": [0, 5]}))


def test_an_earlier_meta_model_is_used_again(job: Make, monkeypatch: Any) -> None:
    first, built = checked(job()), []
    real = skeleton.build_skeleton
    monkeypatch.setattr("veneer.base.meta.build_skeleton", lambda *a, **k: built.append(a) or real(*a, **k))
    other = preflight(first.job.with_recipe(job(**{"train.recompute": True})), earlier=first)
    assert other.meta is first.meta and other.adapter is first.adapter and built == []
    with pytest.raises(ConfigError, match="there is no block 5"):
        preflight(first.job.with_recipe(job(**{"train.recompute": [5]})), earlier=first)
