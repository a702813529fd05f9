"""A folder is a model, or the message lists all it lacks."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from veneer.disk.model_dir import open_model_dir
from veneer.disk.tensors import write_model_tensors
from veneer.errors import ModelError


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_a_whole_folder_opens(folder: Path) -> None:
    found = open_model_dir(folder)
    assert found.config["model_type"] == "llama"
    assert [f.name for f in found.weights] == ["model.safetensors"]


def test_everything_missing_is_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        open_model_dir(tmp_path)
    text = str(caught.value)
    assert f"{tmp_path} is not a complete model folder:" in text
    assert "config.json is missing" in text
    assert "no weights: model.safetensors, or model.safetensors.index.json and the shards it names, is needed" in text
    assert "no tokenizer: tokenizer.json, or tokenizer.model, or vocab.json + merges.txt" in text
    assert caught.value.exit_status == 2


def test_a_folder_that_is_not_there_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not there; a model folder was expected"):
        open_model_dir(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file; a model folder was expected"):
        open_model_dir(tmp_path / "file")


def test_a_tokenizer_may_be_left_out_on_request(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        open_model_dir(folder)
    assert open_model_dir(folder, tokenizer=False).config


@pytest.mark.parametrize(
    ("config", "message"),
    [("{", "config.json is not valid JSON: .*line 1"), ("{}", "no model_type"), ("[]", "no model_type")],
)
def test_a_broken_config(folder: Path, config: str, message: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message):
        open_model_dir(folder)


def test_cut_weights_are_found_without_reading_them(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"  model\.safetensors is cut short: \d+ bytes, \d+ expected"):
        open_model_dir(folder)


def test_missing_shards_and_tensors_are_all_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    tensors = {f"t{i}": torch.ones(4) for i in range(3)}
    write_model_tensors(folder, {n: (t.dtype, (4,)) for n, t in tensors.items()}, tensors.items(), shard_bytes=16)
    assert len(open_model_dir(folder).weights) == 3
    index = folder / "model.safetensors.index.json"
    named = json.loads(index.read_text())
    named["weight_map"]["lost"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(named))
    with pytest.raises(ModelError, match=r"1 tensors of .* are not in their shards: lost \(model-00001"):
        open_model_dir(folder)
    for n in (1, 3):
        (folder / f"model-0000{n}-of-00003.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        open_model_dir(folder)
    assert "model-00001-of-00003.safetensors does not exist" in str(caught.value)
    assert "model-00003-of-00003.safetensors does not exist" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("adapter_config.json", "It holds an adapter: give the model it was trained on"),
        ("pytorch_model.bin", "pickled weights, which can run code when loaded"),
        ("x.gguf", r"It holds a GGUF file; give that file itself: .*x\.gguf"),
    ],
)
def test_advice_fits_what_is_there(tmp_path: Path, file: str, advice: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(ModelError, match=advice):
        open_model_dir(tmp_path)
