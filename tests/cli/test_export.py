"""`veneer export` writes forms that others read, says what they lose, and refuses what cannot be said in them."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from tests.methods.layers import moved
from tests.methods.parity import fresh, logits, peft_loads
from veneer.adapters.attach import attach, load_adapter
from veneer.cli.main import invoke
from veneer.methods.base import config_from
from veneer.prompts.base import config_from as prompt_config


def saved(model: Path, folder: Path, method: str, prompt: bool = False, targets: Any = "all-linear", **own: Any) -> Any:
    """The logits of a moved adapter that was saved to `folder`."""
    on = fresh(model)
    front = prompt_config("prefix", {"tokens": 3}) if prompt else None
    adapter = attach(on, config_from(method, own), targets, prompt=front).eval()
    for n, delta in enumerate(adapter.deltas.values()):
        moved(delta, 0.1, seed=n)
    adapter.save(folder)
    return logits(on)


def run(model: Path, tmp_path: Path, to: str, *more: str, into: str = "out") -> int:
    given = ["export", str(model), "--adapter", str(tmp_path / "a"), "--to", to, "--into", str(tmp_path / into)]
    return invoke([*given, *more])


def test_a_mora_adapter_becomes_an_equal_lora_that_peft_loads(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    want = saved(tiny_model, tmp_path / "a", "mora", rank=2, variant="sharing")
    assert run(tiny_model, tmp_path, "lora") == 0
    assert "equal to the mora adapter" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = logits(peft_loads(tiny_model, tmp_path / "out"))
    assert float((there - want).abs().max()) < 1e-3


def test_what_a_nearest_lora_loses_is_told(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tiny_model, tmp_path / "a", "mora", rank=2, variant="rotation")
    assert run(tiny_model, tmp_path, "lora") == 2
    assert "has no small rank, so there is no equal LoRA; give a rank" in capsys.readouterr().err
    errors = []
    for rank in (2, 8, 32):
        assert run(tiny_model, tmp_path, "lora", "--rank", str(rank), "--json", into=f"r{rank}") == 0
        result = json.loads(capsys.readouterr().out)
        errors.append(result["error"])
        assert result["rank"] == rank and result["exact"] == (result["error"] == 0)
    assert errors[0] > errors[1] > errors[2]
    assert run(tiny_model, tmp_path, "lora", "--rank", "2") == 0
    assert f"not equal: it loses at most {errors[0]:.2%} of an update (model.layers." in capsys.readouterr().out


def test_the_methods_own_folder_and_a_file_for_llama_cpp(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    want = saved(tiny_model, tmp_path / "a", "dora", rank=2)
    assert run(tiny_model, tmp_path, "peft", "--json") == 0
    assert json.loads(capsys.readouterr().out)["to"] == "peft"
    model = fresh(tiny_model)
    load_adapter(model, tmp_path / "out")
    assert float((logits(model) - want).abs().max()) == 0
    saved(tiny_model, tmp_path / "a", "lora", rank=2)
    assert run(tiny_model, tmp_path, "gguf", "--json", into="a.gguf") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert len(GGUFReader(tmp_path / "a.gguf").tensors) == 28


@pytest.mark.parametrize(
    ("method", "settings", "to", "more", "status", "said"),
    [
        ("lora", {}, "ggufs", [], 2, "--to ggufs: there is no such form. Did you mean 'gguf'? Known: peft"),
        ("lora", {}, "lora", ["--rank", "0"], 2, "--rank must be at least 1, got 0"),
        ("lora", {}, "peft", ["--rank", "4"], 2, "--rank is of --to lora and gguf; --to peft writes the adapter as it"),
        ("mora", {"rank": 2}, "peft", [], 2, "PEFT has no word for mora; --to lora makes a LoRA of it"),
        ("full", {"targets": ("q_proj",)}, "peft", [], 2, "PEFT has no word for full"),
        ("bottleneck", {"targets": ("o_proj", "down_proj")}, "lora", [], 2, "cannot be folded"),
        ("lora", {"prompt": True}, "peft", [], 2, "lora + prefix is two adapters to PEFT: export the folders `method`"),
        ("lora", {"prompt": True}, "gguf", [], 2, "lora + prefix: tokens in front of the text are no change of a"),
    ],
)  # fmt: skip
def test_what_cannot_be_said(
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    settings: dict[str, Any],
    to: str,
    more: list[str],
    status: int,
    said: str,
) -> None:
    saved(tiny_model, tmp_path / "a", method, **settings)
    assert run(tiny_model, tmp_path, to, *more) == status
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_taken(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tiny_model, tmp_path / "a", "lora")
    assert run(tiny_model, tmp_path, "lora", into="a") == 2
    assert "exists already; export to a new path" in capsys.readouterr().err
