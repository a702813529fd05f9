"""Adapter folders as bytes: PEFT's two files and ours; missing, half-written, damaged and foreign ones are named."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer.disk.adapter_dir import (
    CONFIG,
    FACTS,
    TENSORS,
    AdapterFiles,
    adapter_bytes,
    parts_of,
    read_adapter,
    read_facts,
    write_adapter,
    write_parts,
)
from veneer.disk.tensors import TensorWriter
from veneer.errors import AdapterMismatch, DiskError

FILES = AdapterFiles(
    {"peft_type": "LORA", "r": 2, "target_modules": ["naïve"]},
    {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)},
    {"format": 1, "base": {"fingerprint": "abc"}},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "adapter", FILES)
    return tmp_path / "adapter"


def test_what_is_written_is_read_again(folder: Path) -> None:
    read = read_adapter(folder)
    assert read.config == FILES.config
    assert read.facts == FILES.facts
    assert set(read.tensors) == {"a", "b"}
    for name, tensor in FILES.tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)


def test_the_files_are_those_peft_writes_and_ours(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS, FACTS]
    assert write_adapter(folder, FILES) == adapter_bytes(folder) == sum(p.stat().st_size for p in folder.iterdir())


def test_equal_content_is_equal_bytes(folder: Path, tmp_path: Path) -> None:
    again = AdapterFiles(FILES.config, dict(reversed(FILES.tensors.items())), FILES.facts)
    write_adapter(tmp_path / "again", again)
    for name in (CONFIG, TENSORS, FACTS):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_tensors_that_share_memory_or_are_views_are_written_apart(tmp_path: Path) -> None:
    one = torch.arange(6.0).reshape(2, 3)
    write_adapter(tmp_path / "x", AdapterFiles({}, {"a": one, "b": one, "c": one.T, "d": one[1]}))
    read = load_file(tmp_path / "x" / TENSORS)
    for name, want in {"a": one, "b": one, "c": one.T, "d": one[1]}.items():
        assert torch.equal(read[name], want)


def test_a_folder_of_peft_has_no_facts(folder: Path) -> None:
    (folder / FACTS).unlink()
    assert read_adapter(folder).facts == {}


def refused(folder: Path) -> str:
    with pytest.raises(AdapterMismatch) as caught:
        read_adapter(folder)
    return str(caught.value)


def test_a_missing_folder_names_close_ones(folder: Path) -> None:
    assert refused(folder.parent / "adaptr") == (
        f"there is no adapter folder {folder.parent / 'adaptr'}. Did you mean 'adapter'?"
    )
    assert refused(folder.parent / "no" / "where") == f"there is no adapter folder {folder.parent / 'no' / 'where'}."


def test_a_file_is_no_folder(folder: Path) -> None:
    said = refused(folder / TENSORS)
    assert said == f"{folder / TENSORS} is a file; an adapter is a folder that holds {CONFIG} and {TENSORS}"


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_half_written_folder_says_what_is_missing_and_what_was_found(folder: Path, name: str) -> None:
    (folder / name).unlink()
    left = ", ".join(sorted(p.name for p in folder.iterdir()))
    assert refused(folder) == f"{folder} is not an adapter folder: {name} missing; found {left}."


def test_an_empty_folder(tmp_path: Path) -> None:
    said = refused(tmp_path)
    assert said == f"{tmp_path} is not an adapter folder: {CONFIG} and {TENSORS} missing; found nothing."


def test_a_run_folder_points_to_its_adapter(folder: Path) -> None:
    assert refused(folder.parent).endswith(f"found adapter. Did you mean {folder}?")


def test_a_pickle_is_never_read(folder: Path) -> None:
    (folder / TENSORS).unlink()
    torch.save({"a": torch.ones(1)}, folder / "adapter_model.bin")
    said = refused(folder)
    assert f"{folder} holds adapter_model.bin, a pickle, which can run code when it is read" in said
    assert "save it again with safe_serialization=True" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "is not valid JSON: Expecting property name"),
        (b"", "is not valid JSON: Expecting value: line 1 column 1"),
        (b"\xff\xfe\x00", "is not valid JSON: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "is not valid JSON: "),
        (b"[1]", "should hold one JSON object, but holds a list"),
        (b"null", "should hold one JSON object, but holds a NoneType"),
    ],
)
@pytest.mark.parametrize("name", [CONFIG, FACTS])
def test_json_that_is_none_is_named(folder: Path, name: str, content: bytes, said: str) -> None:
    (folder / name).write_bytes(content)
    assert refused(folder).startswith(f"{folder / name} {said}")


def test_a_changed_byte_is_seen(folder: Path) -> None:
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)
    said = refused(folder)
    assert f"{folder / TENSORS} is not the file that {FACTS} was written with: it was damaged or changed." in said
    assert f"delete {FACTS} if it was changed on purpose" in said
    (folder / FACTS).unlink()
    assert set(read_adapter(folder).tensors) == {"a", "b"}


@pytest.mark.parametrize("content", [b"", b"short", b"\x00" * 8, b"\xff" * 64, b"PK\x03\x04 a pickle, rather"])
def test_tensors_that_are_none_are_named(folder: Path, content: bytes) -> None:
    (folder / FACTS).unlink()
    (folder / TENSORS).write_bytes(content)
    said = refused(folder)
    assert said.startswith(f"{folder / TENSORS} cannot be read (")
    assert said.endswith("copy it again or train again")


def test_a_config_that_is_a_folder_is_missing(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    assert f"{CONFIG} missing" in refused(folder)


def test_a_full_disk_leaves_the_earlier_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorWriter, "write", full)
    with pytest.raises(DiskError, match=f"the disk is full: {folder / TENSORS} was not written"):
        write_adapter(folder, FILES)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"]


def test_the_file_is_what_safetensors_writes(folder: Path, tmp_path: Path) -> None:
    save_file(dict(FILES.tensors), tmp_path / "theirs", metadata={"format": "pt"})
    assert (folder / TENSORS).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_settings_that_are_no_json_leave_the_earlier_folder(folder: Path) -> None:
    with pytest.raises(TypeError):
        write_adapter(folder, AdapterFiles({"r": {1, 2}}, {}))
    assert json.loads((folder / CONFIG).read_text(encoding="utf-8")) == FILES.config


def test_a_folder_of_parts(tmp_path: Path) -> None:
    parts = {
        name: AdapterFiles({"peft_type": name}, {"w": torch.full((2,), n)}) for n, name in ((1.0, "a"), (2.0, "b"))
    }
    written = write_parts(tmp_path / "both", parts, {"recipe": 1})
    assert written == adapter_bytes(tmp_path / "both") > 0
    assert parts_of(tmp_path / "both") == [tmp_path / "both" / "a", tmp_path / "both" / "b"]
    assert read_facts(tmp_path / "both")["recipe"] == 1
    for name, files in parts.items():
        again = read_adapter(tmp_path / "both" / name)
        assert again.config == files.config and torch.equal(again.tensors["w"], files.tensors["w"])
    with pytest.raises(AdapterMismatch, match=r"is not an adapter folder: .* missing; found a, b, veneer\.json"):
        read_adapter(tmp_path / "both")
    write_adapter(tmp_path / "one", parts["a"])
    assert parts_of(tmp_path / "one") == [] == parts_of(tmp_path / "nowhere")
    assert read_facts(tmp_path / "one") == {}
    with pytest.raises(AdapterMismatch, match="there is no adapter folder"):
        read_facts(tmp_path / "nowhere")


@pytest.mark.parametrize("facts", [{"parts": 3}, {"parts": {"../a": "x"}}])
def test_a_folder_that_should_name_its_parts(tmp_path: Path, facts: dict[str, object]) -> None:
    (tmp_path / "veneer.json").write_text(json.dumps(facts))
    with pytest.raises(AdapterMismatch, match=r"veneer\.json should name the folders of its parts, but says"):
        parts_of(tmp_path)
