"""The reference implementation of safetensors reads what we write, and we read what it writes."""

import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from veneer.disk import tensors as tensors_module
from veneer.disk.tensors import (
    DTYPES,
    FEW,
    NAMES,
    Spec,
    nbytes,
    open_tensors,
    read_header,
    weight_files,
    write_model_tensors,
    writing_tensors,
)
from veneer.errors import DiskError


def made(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 if dtype == torch.bool else 64, (*shape, dtype.itemsize), dtype=torch.uint8, generator=rng)
    return raw.view(dtype).reshape(shape)


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.view(torch.uint8).tolist() == b.view(torch.uint8).tolist()


@given(
    st.lists(st.tuples(st.sampled_from(list(NAMES)), st.lists(st.integers(0, 5), min_size=1, max_size=3)), max_size=6)
)
def test_the_reference_reads_what_we_write(tmp_path_factory: pytest.TempPathFactory, wanted: list) -> None:
    file = tmp_path_factory.mktemp("t") / "x.safetensors"
    tensors = {f"t{i}": made(dtype, tuple(shape), i) for i, (dtype, shape) in enumerate(wanted)}
    with writing_tensors(file, specs_of(tensors), {"note": "n"}) as writer:
        for name in reversed(list(tensors)):
            writer.write(name, tensors[name])
    read = load_file(file)
    assert read.keys() == tensors.keys()
    assert all(same(read[name], tensors[name]) for name in tensors)
    ours = open_tensors(file)
    assert ours.metadata == {"format": "pt", "note": "n"}
    assert all(same(ours.read(name), tensors[name]) for name in tensors)
    assert all(ours[name].start % max(1, ours[name].dtype.itemsize) == 0 for name in ours)


def test_we_read_what_the_reference_writes(tmp_path: Path) -> None:
    tensors = {f"t{i}": made(dtype, (3, 4), i) for i, dtype in enumerate(NAMES)} | {"scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "x.safetensors")
    ours = open_tensors(tmp_path / "x.safetensors")
    assert set(ours) == set(tensors)
    assert all(
        torch.equal(ours.read(n).view(-1).view(torch.uint8), t.view(-1).view(torch.uint8)) for n, t in tensors.items()
    )
    assert ours["scalar"].shape == ()


def test_every_dtype_of_torch_that_safetensors_writes_is_known() -> None:
    assert len(NAMES) == len(DTYPES)
    assert nbytes((torch.bfloat16, (3, 5))) == 30


def test_shards_and_index_are_read_by_name(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": made(torch.float32, (10, 10), i) for i in range(5)}
    write_model_tensors(tmp_path, specs_of(tensors), tensors.items(), shard_bytes=900)
    assert [f.name for f in weight_files(tmp_path)] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 400
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    ours = open_tensors(tmp_path)
    assert all(torch.equal(ours.read(name), tensors[name]) for name in tensors)


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2)}
    write_model_tensors(tmp_path, specs_of(tensors), tensors.items())
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("cut", [1, 100, -4, -300, -405])
def test_a_file_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(10, 10)}, file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DiskError, match=r"x\.safetensors is (cut short|no safetensors)"):
        open_tensors(file)


def test_a_file_cut_after_it_was_listed_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(10, 10)}, file)
    ours = open_tensors(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(DiskError, match="'a' has 392 of its 400 bytes"):
        ours.read("a")


def with_header(file: Path, header: bytes, data: bytes = b"") -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return file


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "header is not JSON"),
        (b'{"a": 3}', "describes no tensors"),
        (b'{"a": {"dtype": "F12", "shape": [1], "data_offsets": [0, 4]}}', "'a' has dtype F12; known are F64, F32"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "lies at 0:4, but 0:8 was expected"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}', "lies at 8:12, but 0:4 was expected"),
        (b"{}", "is too long: 14 bytes, 10 expected"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    with pytest.raises(DiskError, match=message):
        read_header(with_header(tmp_path / "x.safetensors", header, b"1234"))


def test_missing_files_and_wrong_indexes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"gone\.safetensors does not exist"):
        open_tensors(tmp_path / "gone.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(DiskError, match="is not a shard index"):
        open_tensors(tmp_path)


def test_writing_checks_each_tensor_and_that_all_came(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    specs: dict[str, Spec] = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with (
        pytest.raises(DiskError, match=r"1 tensors were announced and not written: b"),
        writing_tensors(file, specs) as w,
    ):
        w.write("a", torch.ones(2))
    with pytest.raises(DiskError, match="'a' was already written"), writing_tensors(file, specs) as w:
        w.write("a", torch.ones(2))
        w.write("a", torch.ones(2))
    with pytest.raises(DiskError, match="'c' was not announced"), writing_tensors(file, specs) as w:
        w.write("c", torch.ones(2))
    with (
        pytest.raises(DiskError, match=r"'a' is torch.float32 \(3,\), announced was"),
        writing_tensors(file, specs) as w,
    ):
        w.write("a", torch.ones(3))
    assert list(tmp_path.iterdir()) == [], "an unfinished file was left"


def test_an_unfinished_write_leaves_the_earlier_file(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, file)
    before = file.read_bytes()
    with pytest.raises(RuntimeError, match="stop"), writing_tensors(file, {"a": (torch.float32, (2,))}):
        raise RuntimeError("stop")
    assert file.read_bytes() == before


def test_mapped_tensors_are_the_file_and_writing_to_them_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    wanted = {"a": torch.arange(3000.0).view(1000, 3), "b": torch.ones(FEW, dtype=torch.uint8)}
    wanted |= {"none": torch.empty(0, 3), "few": torch.ones(FEW - 1, dtype=torch.uint8)}
    with writing_tensors(path, {n: (t.dtype, tuple(t.shape)) for n, t in wanted.items()}) as writer:
        for name, tensor in wanted.items():
            writer.write(name, tensor)
    path.chmod(0o444)
    tensors, before = open_tensors(path), path.read_bytes()
    for name, tensor in wanted.items():
        assert torch.equal(tensors.map(name), tensor)
    a = tensors.map("a")
    assert a.untyped_storage().data_ptr() == tensors.map("b").untyped_storage().data_ptr()
    assert a.untyped_storage().data_ptr() != tensors.map("few").untyped_storage().data_ptr()
    a.fill_(7)
    tensors.map("few").fill_(7)
    assert path.read_bytes() == before
    assert list(tensors.without(["a", "none", "few"])) == ["b"]


def test_a_file_of_which_only_small_tensors_are_asked_for_is_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"few": torch.ones(FEW // 4 - 1), "many": torch.ones(FEW)}, path)
    tensors = open_tensors(path)
    tensors.map("few")
    assert str(path) not in Path("/proc/self/maps").read_text()
    kept = tensors.map("many")
    assert str(path) in Path("/proc/self/maps").read_text()
    assert kept.tolist() == [1.0] * FEW


def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are opened from here on."""
    names: list[str] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: names.append(self.name) or real(self, *a, **k))
    return names


def test_a_header_is_read_once_and_again_when_its_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4)}, path)
    monkeypatch.setattr(tensors_module, "SETTLED", 0.01)
    time.sleep(0.05)
    names = opened(monkeypatch)
    assert list(open_tensors(path)) == list(open_tensors(path)) == ["a"]
    assert names == ["a.safetensors"]
    before = path.stat()
    with path.open("r+b") as file:  # another name, where it lies: the same inode, size and date
        file.write(path.read_bytes().replace(b'"a"', b'"b"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert list(open_tensors(path)) == ["b"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DiskError, match="is cut short"):
        open_tensors(path)
    path.unlink()
    with pytest.raises(DiskError, match="does not exist"):
        open_tensors(path)


def test_the_header_of_a_file_that_changed_just_now_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4)}, path)
    monkeypatch.setattr(tensors_module, "SETTLED", 60)
    names = opened(monkeypatch)
    open_tensors(path)
    open_tensors(path)
    assert names == ["a.safetensors"] * 2


def test_what_is_remembered_cannot_be_changed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "a.safetensors")
    entries, notes = read_header(tmp_path / "a.safetensors")
    with pytest.raises(TypeError):
        entries["b"] = entries["a"]  # type: ignore[index]
    with pytest.raises(TypeError):
        notes["b"] = "c"  # type: ignore[index]


def test_a_tensor_at_an_odd_address_is_copied(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    header = {"u": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    header["f"] = {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x01" + struct.pack("<2f", 2, 3))
    assert open_tensors(path).map("f").tolist() == [2.0, 3.0]
