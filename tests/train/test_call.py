"""`veneer.train(...)`: a recipe, or an adapter that is attached already, with the same bytes either way."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import veneer.evaluate
import veneer.train
from veneer.adapters.attach import attach, load_adapter
from veneer.base.load import load_model
from veneer.disk.adapter_dir import read_facts
from veneer.errors import ConfigError
from veneer.methods.base import config_from
from veneer.prompts.base import config_from as prompt_config
from veneer.recipe.load import load_recipe, write_recipe
from veneer.recipe.settings import Recipe

Make = Callable[..., Recipe]
PISSA = {"name": "pissa", "iterations": 2}
SHORT: dict[str, Any] = {
    "train": {"tokens_per_step": 256, "micro_batch_tokens": 128, "max_length": 128},
    "steps": 3,
    "lr": 0.01,
}


def weights(folder: str) -> bytes:
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def call(*given: Any, **named: Any) -> Any:
    return veneer.train(*given, **named)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("method", "storage"),
    [
        ({"name": "lora", "rank": 4, "dropout": 0.2}, "dense"),
        ({"name": "lora", "rank": 2, "init": PISSA, "targets": ["q_proj", "v_proj"]}, "nf4"),
        ({"name": "dora", "rank": 2, "layers": [1]}, "dense"),
    ],
    ids=["lora", "pissa on nf4", "dora"],
)
def test_an_attached_adapter_ends_with_the_bytes_of_its_recipe(
    job: Make, rows: Path, tmp_path: Path, method: dict[str, Any], storage: str
) -> None:
    recipe = job("recipe", method=method, storage=storage, **{"train.steps": 3})
    base = load_model(recipe.model, storage=storage, dtype="float32")
    own = {k: v for k, v in method.items() if k not in ("name", "targets", "layers")}
    adapter = attach(base, config_from(method["name"], own), targeting(method)).eval()
    run = call(base, adapter, data=rows, run=tmp_path / "attached", **SHORT)
    assert weights(run.adapter) == weights(call(recipe).adapter)
    assert run.steps == 3 and run.folder == str(tmp_path / "attached")
    written = load_recipe(tmp_path / "attached" / "recipe.yaml")
    assert (written.train, written.optimizer) == (recipe.train, recipe.optimizer)
    assert recipe.method.own.items() <= written.method.own.items() and written.method.layers == recipe.method.layers
    fresh = load_adapter(load_model(recipe.model, storage=storage, dtype="float32"), run.adapter)
    for a, b in zip(adapter.parameters(), fresh.parameters(), strict=True):
        assert a.shape != b.shape or torch.equal(a, b)  # PiSSA is written as a LoRA of twice the rank


def targeting(method: dict[str, Any]) -> Any:
    from veneer.adapters.targets import Targeting

    return Targeting(
        targets=tuple(method["targets"]) if "targets" in method else "all-linear",
        layers=tuple(method.get("layers", ())),
    )


def test_a_prompt_beside_a_method_is_trained_in_place(job: Make, rows: Path, tmp_path: Path) -> None:
    base = load_model(job().model, dtype="float32")
    adapter = attach(base, config_from("lora", {"rank": 2}), prompt=prompt_config("prefix", {"tokens": 3}))
    before = [p.detach().clone() for p in adapter.parameters()]
    run = call(base, adapter, data=rows, run=tmp_path / "both", **SHORT)
    assert any(not torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True))
    assert load_recipe(Path(run.folder) / "recipe.yaml").prompt.name == "prefix"


def test_a_trained_adapter_knows_how_its_rows_were_read(job: Make, tmp_path: Path) -> None:
    base = load_model(job("recipe").model, dtype="float32")
    adapter = attach(base, config_from("lora", {"rank": 2}))
    held_out = tmp_path / "rows.jsonl"
    held_out.write_text('{"q": "Which city?", "a": "Rome"}\n' * 4)
    data = {"train": str(held_out), "prompt": "Say: {q}", "completion": "{a}"}
    run = call(base, adapter, data=data, run=tmp_path / "run", **SHORT)
    found = veneer.evaluate(base, held_out, metrics=["loss"])
    asked = veneer.evaluate(base, held_out, metrics=["loss"], prompt="Say: {q}", completion="{a}")
    assert found.metrics == asked.metrics
    adapter.save(tmp_path / "saved")
    saved, written = read_facts(tmp_path / "saved"), read_facts(Path(run.adapter))
    assert saved == written and saved["recipe"]["data"]["prompt"] == "Say: {q}"
    adapter.save(tmp_path / "bare", {})
    assert "recipe" not in read_facts(tmp_path / "bare")


def test_a_run_without_a_folder_gets_a_new_one_each_time(
    job: Make, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = load_model(job().model, dtype="float32")
    adapter = attach(base, config_from("lora", {"rank": 2}))
    first, second = (call(base, adapter, data=rows, **SHORT) for _ in range(2))
    assert (first.folder, second.folder) == ("runs/run-1", "runs/run-2")
    assert Path(second.adapter).is_dir()


def test_a_recipe_file_takes_keys_by_any_of_their_names(job: Make, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(write_recipe(job("run")))
    said: list[str] = []
    run = call(tmp_path / "recipe.yaml", steps=2, train={"warmup": 0}, max_grad_norm=0.5, say=said.append)
    written = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["train"]
    assert run.steps == 2 and (written["warmup"], written["clip"]) == (0, 0.5)
    assert said[0].startswith("reading ")
    assert call(str(tmp_path / "recipe.yaml"), steps=2, train={"warmup": 0}, max_grad_norm=0.5) == run  # done already


def test_listeners_hear_every_step(job: Make) -> None:
    told: list[int] = []
    call(job().tree(), steps=2, listeners=[lambda event: told.append(event.step)])
    assert told == [1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": -1.0}, r"optimizer\.lr: optimizer\.lr is -1\.0: input should be greater than 0"),
        ({"stesp": 2}, r"stesp: there is no key stesp. Did you mean 'steps'"),
        ({"batch_size": 4}, r"batch_size: batch_size: batches are counted in tokens here"),
        ({"num_virtual_tokens": 4}, r"prompt: the base and the adapter say this already; leave it out"),
        ({"train": {"recompute": 9}}, r"there is no block 2"),
        ({"method": {"rank": 4}}, r"method: the base and the adapter say this already; leave it out"),
    ],
)
def test_what_is_wrong_is_said_in_pythons_words(
    job: Make, rows: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    base = load_model(job().model, dtype="float32")
    adapter = attach(base, config_from("lora", {"rank": 2}))
    with pytest.raises(ConfigError, match=message) as caught:
        call(base, adapter, data=rows, run=tmp_path / "run", **given)
    assert "--" not in str(caught.value)


def test_bases_and_adapters_that_do_not_belong_together_are_refused(job: Make, rows: Path) -> None:
    base, other = (load_model(job().model, dtype="float32") for _ in range(2))
    adapter = attach(base, config_from("lora", {"rank": 2}))
    with pytest.raises(ConfigError, match="this adapter is on another base"):
        call(other, adapter, data=rows)
    with pytest.raises(ConfigError, match="a base without an adapter"):
        call(base, data=rows)
    with pytest.raises(ConfigError, match="a recipe and an adapter"):
        call(job(), adapter)
    adapter.detach()
    with pytest.raises(ConfigError, match=r"this adapter is detached; call adapter.attach\(\)"):
        call(base, adapter, data=rows)


def test_rows_longer_than_the_base_reads_are_refused_for_both(job: Make, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text('{"prompt": "a", "completion": "' + "count " * 300 + '"}\n')
    base = load_model(job().model, dtype="float32")
    adapter = attach(base, config_from("lora", {"rank": 2}))
    with pytest.raises(ConfigError, match="but the model reads at most 256"):
        call(base, adapter, data=tmp_path / "long.jsonl", run=tmp_path / "run", train={"max_length": 2048})


def test_importing_the_package_imports_no_torch() -> None:
    code = "import veneer.train, sys; assert callable(veneer.train) and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
