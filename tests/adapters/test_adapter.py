"""What every adapter can do, whatever its parts; several folders are one adapter, and nobody loads half unknowingly."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.methods.layers import moved
from tests.methods.parity import TOKENS, fresh, logits, peft_loads
from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach, load_adapter
from veneer.base.base import Base
from veneer.disk.adapter_dir import read_facts
from veneer.errors import AdapterMismatch, NotFoldable
from veneer.merge.fold import merge
from veneer.methods.base import config_from
from veneer.prompts.base import config_from as prompt_config


def one(kind: str, model: Any) -> Adapter:
    config = config_from("lora", {"rank": 2, "init": "random", "dropout": 0.5})
    prompt = prompt_config("prefix", {"tokens": 3})
    return attach(model, None if kind == "prompt" else config, prompt=None if kind == "deltas" else prompt)


@pytest.mark.parametrize(("kind", "said"), [("deltas", "lora"), ("prompt", "prefix"), ("both", "lora + prefix")])
def test_its_verbs(tiny_model: Path, kind: str, said: str) -> None:
    model = fresh(tiny_model)
    plain = logits(model)
    change = one(kind, model).eval()
    assert change.kind == said and change.attached and change.attach() is change
    changed = logits(model)
    assert not torch.allclose(changed, plain)
    with change.disabled() as base:
        assert base is model and not change.attached
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), changed)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(holder.training for holder in change.train().holders().values())
    inside = [p for holder in change.holders().values() for p in holder.parameters()]
    assert {id(p) for p in change.parameters()} == {id(p) for p in inside}
    assert change.n_params() == sum(p.numel() for p in inside)
    assert {n.place for n in change.named()} == {"deltas": {"layer"}, "prompt": {"prompt"}}.get(
        kind, {"layer", "prompt"}
    )
    assert (change.settings is None) == (kind == "prompt") == (not change.deltas)
    assert change.penalty() is None
    change.stepped_(1, 2)
    change.detach()
    assert torch.equal(logits(model), plain)
    assert all(p.requires_grad for p in model.parameters())


def trained(model: Any, prompt: str) -> Adapter:
    front = prompt_config(prompt, {"tokens": 4})
    both = attach(Base.of(model, name="somewhere"), config_from("lora", {"rank": 2}), prompt=front).eval()
    for n, holder in enumerate(both.holders().values()):
        moved(holder, 0.2, seed=n)  # type: ignore[arg-type]
    return both


@pytest.fixture(params=["prompt", "prefix"])
def saved(request: pytest.FixtureRequest, tiny_model: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A saved folder and the logits of what was saved."""
    model = fresh(tiny_model)
    both = trained(model, request.param)
    written = both.save(tmp_path / "both", {"recipe": {"a": 1}})
    assert written == sum(f.stat().st_size for f in (tmp_path / "both").rglob("*") if f.is_file())
    return tmp_path / "both", logits(model)


def test_saved_and_loaded(tiny_model: Path, saved: tuple[Path, torch.Tensor]) -> None:
    folder, want = saved
    model = fresh(tiny_model)
    plain = logits(model)
    both = load_adapter(model, folder)
    kind = json.loads((folder / "prompt" / "veneer.json").read_text())["method"]
    assert both.kind == "lora + " + kind and both.base_name == "somewhere"
    assert torch.equal(logits(model), want)
    both.detach()
    assert torch.equal(logits(model), plain)
    facts = read_facts(folder)
    assert facts["recipe"] == {"a": 1} and set(facts["parts"]) == {"method", "prompt"}
    assert facts["base"]["fingerprint"] == read_facts(folder / "method")["base"]["fingerprint"]


def test_peft_reads_each_part_and_refuses_the_whole(tiny_model: Path, saved: tuple[Path, torch.Tensor]) -> None:
    folder, _ = saved
    for part in ("method", "prompt"):
        model = fresh(tiny_model)
        load_adapter(model, folder / part)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            there = logits(peft_loads(tiny_model, folder / part))
        assert float((there[:, -TOKENS.shape[1] :] - logits(model)).abs().max()) < 1e-4
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        peft.PeftModel.from_pretrained(fresh(tiny_model), str(folder))


def test_a_merge_names_the_prompt(tiny_model: Path, saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = saved
    kind = json.loads((folder / "prompt" / "veneer.json").read_text())["method"]
    both = load_adapter(fresh(tiny_model), folder)
    said = f"lora \\+ {kind}: tokens in front of the text are no change of a weight.*the part in its folder `method`"
    with pytest.raises(NotFoldable, match=said):
        merge(both, tiny_model, tmp_path / "merged")
    alone = load_adapter(fresh(tiny_model), folder / "prompt")
    with pytest.raises(NotFoldable, match=f"^{kind}: tokens in front of the text.*cannot be folded into one. Nothing"):
        merge(alone, tiny_model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    merge(load_adapter(fresh(tiny_model), folder / "method"), tiny_model, tmp_path / "merged")


def test_parts_that_do_not_belong_together(tiny_model: Path, saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = saved
    model = fresh(tiny_model)
    plain = logits(model)
    other = attach(fresh(tiny_model), config_from("lora", {"rank": 2, "init": "random"}))
    other.save(tmp_path / "other")
    for file in (tmp_path / "other").iterdir():
        (folder / "method" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(AdapterMismatch, match=r"not the file that the other parts of .* were trained with"):
        load_adapter(model, folder)
    (folder / "method" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterMismatch, match=r"adapter_model\.safetensors missing"):
        load_adapter(model, folder)
    assert torch.equal(logits(model), plain)


def test_a_part_that_fails_takes_the_other_off_again(tiny_model: Path, tmp_path: Path, made_model: Any) -> None:
    trained(fresh(tiny_model), "prefix").save(tmp_path / "both")
    facts = tmp_path / "both" / "prompt" / "veneer.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"format": 99}))
    model = fresh(tiny_model)
    plain = logits(model)
    with pytest.raises(AdapterMismatch, match="has format 99, known here is 1"):
        load_adapter(model, tmp_path / "both")
    assert torch.equal(logits(model), plain)
    assert all(p.requires_grad for p in model.parameters())
