"""`veneer quantize` writes a folder that is used like any model, and says how far the weights moved."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from veneer.base.load import load_model
from veneer.base.storage_config import base_storage, storage_of
from veneer.cli import quantize
from veneer.cli.main import invoke
from veneer.disk.tensors import open_tensors


def run(*arguments: object) -> int:
    return invoke(["quantize", *map(str, arguments)])


def test_a_folder_and_its_figures(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nf4"
    assert run(tiny_model, "--to", out, "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = load_model(out, storage=None, dtype="float32").network
    assert storage_of(model) == base_storage("nf4")
    files = open_tensors(tiny_model)
    difference = size = weights = held = largest = 0.0
    for path in (n.removesuffix(".weight") for n in files if "proj" in n):
        kept = model.get_submodule(path).storage
        w, near = files.read(f"{path}.weight").double().numpy(), kept.dense(torch.float32).double().numpy()
        difference, size = difference + np.square(near - w).sum(), size + np.square(w).sum()
        weights, held = weights + w.size, held + kept.nbytes
        largest = max(largest, np.abs(near - w).max())
    assert result["layers"] == 14 and result["weights"] == weights and result["weight_bytes"] == held
    assert result["bits_per_weight"] == pytest.approx(8 * held / weights)
    assert result["relative_error"] == pytest.approx((difference / size) ** 0.5, rel=1e-4)
    assert result["largest_difference"] == pytest.approx(largest, rel=1e-6)
    assert 0.07 < result["relative_error"] <= result["worst_relative_error"] < 0.12
    assert result["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    assert result["folder"] == str(out) and result["storage"]["name"] == "nf4"


@pytest.mark.parametrize(
    ("more", "misread"),
    [([], 12), (["--block", "32"], 0), (["--block", "2048"], 0), (["--storage", "int8"], 0)],
    ids=str,
)
def test_what_bitsandbytes_misreads_is_said(
    tiny_model: Path, tmp_path: Path, more: list[str], misread: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of 32 weights are no multiple of 64; the two down projections have rows of 64."""
    assert run(tiny_model, "--to", tmp_path / "q", "--json", *more) == 0
    said = capsys.readouterr()
    paths = json.loads(said.out.splitlines()[-1])["misread_by_bitsandbytes_on_cpu"]
    assert len(paths) == misread
    words = "on a CPU with AVX-512 misreads model.layers.0.self_attn.q_proj and 11 more, whose rows are not a multiple"
    assert (words in said.err) == bool(misread) == bool(said.err)


def test_settings_and_words(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fp4"
    assert run(tiny_model, "--to", out, "--storage", "fp4", "--block", 32, "--no-double-quant") == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{out}: ") and first.endswith(", fp4 (block 32)")
    assert second.startswith("14 layers, 18,432 weights in ") and second.endswith(" bits a weight")
    assert third.startswith("relative error 0.1")
    wanted = base_storage({"name": "fp4", "block": 32, "double_quant": False})
    assert storage_of(load_model(out, storage=None).network) == wanted


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--storage", "nf5"], "there is no storage 'nf5'"),
        (["--storage", "dense"], "--storage dense quantizes nothing; choose nf4, fp4 or int8"),
        (["--block", "65"], "nf4: block is 65, should be one of 32"),
        (["--storage", "int8", "--block", "64"], "storage int8 has no setting 'block'"),
        (["--storage", "int8", "--no-double-quant"], "storage int8 has no setting 'double_quant'"),
    ],
)
def test_wrong_settings(
    tiny_model: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_model, "--to", tmp_path / "q", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


def test_what_is_there_is_not_replaced_and_nothing_is_quantized_twice(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    assert run(tiny_model, "--to", tmp_path / "taken") == 2
    assert "taken exists already; write into a new folder" in capsys.readouterr().err
    assert run(tiny_model, "--to", tmp_path / "q") == 0
    for _ in range(2):  # second, with a config.json that does not say so
        assert run(tmp_path / "q", "--to", tmp_path / "again") == 2
        assert "is quantized already; give the model it was made from" in capsys.readouterr().err
        about = json.loads((tmp_path / "q" / "config.json").read_text())
        about.pop("quantization_config", None)
        (tmp_path / "q" / "config.json").write_text(json.dumps(about))


def test_what_another_process_put_there_meanwhile_stays(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def meanwhile(*_: object) -> None:
        (tmp_path / "q").mkdir(exist_ok=True)

    monkeypatch.setattr(quantize.Errors, "__call__", meanwhile)
    assert run(tiny_model, "--to", tmp_path / "q") == 2
    assert "q exists already; write into a new folder" in capsys.readouterr().err
    assert list((tmp_path / "q").iterdir()) == []
