"""Finding, building and choosing the C library, and the words for why it is not there."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.errors import ConfigError
from veneer.kernels import native

COMPILER = native.find_compiler()
EXPORTED = 'extern "C" __attribute__((visibility("default")))'
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests choose for themselves, whatever the run is forced to."""
    monkeypatch.delenv("VENEER_NATIVE", raising=False)
    monkeypatch.delenv("VENEER_ISA", raising=False)


def in_a_process(code: str, **environment: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return done.stdout.strip()


STATUS = "from veneer.kernels import native; s = native.status(); print(s.available, s.isa, s.reason, sep='|')"


def test_it_can_be_turned_off() -> None:
    assert in_a_process(STATUS, VENEER_NATIVE="0") == "False|None|turned off by VENEER_NATIVE=0"


def test_an_instruction_set_can_be_forced() -> None:
    if not native.status().available:
        pytest.skip(f"needs the C library: {native.status().reason}")
    assert in_a_process(STATUS, VENEER_ISA="scalar").startswith("True|scalar|")


def test_a_name_that_is_no_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_ISA", "sse9")
    with pytest.raises(ConfigError, match="VENEER_ISA=sse9 is not an instruction set; it can be one of scalar, avx2"):
        native.forced_isa()


class FakeLibrary:
    def veneer_has(self, isa: int) -> int:
        return int(isa in (0, 1))


def test_an_instruction_set_the_machine_lacks_is_refused_by_name() -> None:
    lib: ctypes.CDLL = FakeLibrary()  # type: ignore[assignment]
    assert native.choose_isa(lib, None) == 1
    assert native.choose_isa(lib, "scalar") == 0
    with pytest.raises(ConfigError, match="VENEER_ISA=neon: this machine has no neon; it has scalar, avx2"):
        native.choose_isa(lib, "neon")


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "HERE", tmp_path)
    assert native.locate() == (
        None,
        f"no built library at {tmp_path / 'libveneer.so'} and no sources beside it; reinstall veneer",
    )
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "veneer.cpp").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    path, why = native.locate()
    assert path is None
    assert "no C++ compiler found (looked for $CXX, g++, clang++, c++)" in why


def test_a_compiler_that_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "odd"
    compiler.write_bytes(b"no program at all")
    compiler.chmod(0o755)
    make_sources(tmp_path / "csrc")
    (tmp_path / "csrc" / "veneer.cpp").touch()
    monkeypatch.setattr(native, "HERE", tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    path, why = native.locate()
    assert path is None
    assert why.startswith(f"the C++ compiler {compiler} does not run (Exec format error)")


def test_a_built_library_in_the_package_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "HERE", tmp_path)
    (tmp_path / "libveneer.so").write_bytes(b"no library at all")
    assert native.locate() == (tmp_path / "libveneer.so", "built into the package")
    found = native.load.__wrapped__()
    assert isinstance(found, native.Status)
    assert "could not be loaded" in found.reason and "remove it to" in found.reason


def make_sources(folder: Path) -> Path:
    folder.mkdir()
    (folder / "FLAGS").write_text("-fPIC -shared")
    return folder


@needs_compiler
def test_it_is_built_once_per_source_and_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sources = make_sources(tmp_path / "csrc")
    (sources / "veneer.cpp").write_text(f"{EXPORTED} int veneer_abi(void) {{ return 0; }}\n")
    monkeypatch.setattr(native, "HERE", tmp_path)
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    first, how = native.locate()
    assert first is not None
    assert how == "built now"
    assert native.locate() == (first, "built earlier on this machine")
    assert [p.name for p in first.parent.iterdir()] == [first.name]
    found = native.load.__wrapped__()
    assert isinstance(found, native.Status)
    assert f"{first} has ABI 0, this veneer needs {native.ABI}; remove it" in found.reason
    (sources / "veneer.cpp").write_text(f"{EXPORTED} int veneer_abi(void) {{ return 7; }}\n")
    second, _ = native.locate()
    assert second != first


@needs_compiler
def test_a_failed_build_shows_the_compilers_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_sources(tmp_path / "csrc")
    (tmp_path / "csrc" / "veneer.cpp").write_text("#error this machine is too odd\n")
    monkeypatch.setattr(native, "HERE", tmp_path)
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    path, why = native.locate()
    assert path is None
    assert why.startswith("the kernels could not be built; set CXX to another C++ compiler: ")
    assert "this machine is too odd" in why
    assert list((tmp_path / "cache" / "kernels").iterdir()) == []


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (make_sources(tmp_path / "csrc") / "veneer.cpp").touch()
    (tmp_path / "cache").write_text("a file in the folder's place")
    monkeypatch.setattr(native, "HERE", tmp_path)
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    path, why = native.locate()
    assert path is None
    assert str(tmp_path / "cache") in why and why.endswith("; set VENEER_CACHE to a writable folder")


def test_it_is_said_in_one_line_where_it_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    there = native.Status(True, Path("/x"), "avx2", "built now")
    for status in (there, native.Status(False, None, None, "could not be built: g++\nits words")):
        monkeypatch.setattr(native, "status", lambda found=status: found)
        native.say_without("8-bit AdamW", said.append)
    assert said == ["plain torch computes 8-bit AdamW, slower: could not be built: g++"]


def test_it_runs_in_torchs_own_pool() -> None:
    if not native.status().available or native.loaded_gomp() is None:
        pytest.skip("needs the C library, and a torch with libgomp")
    code = (
        "from veneer.kernels import native; native.load(); import os\n"
        "maps = {l.split(maxsplit=5)[5].strip() for l in open('/proc/self/maps') if 'libgomp' in l}\n"
        "print(len(maps), *maps)"
    )
    assert in_a_process(code).split()[0] == "1", "a second pool of threads was loaded"


def test_constants_agree_with_the_header() -> None:
    header = (Path(__file__).parents[2] / "csrc" / "veneer.h").read_text()
    numbers = ", ".join(f"VENEER_{name.upper()} = {i}" for i, name in enumerate(native.ISAS))
    assert f"enum {{ {numbers}, VENEER_ISAS = {len(native.ISAS)} }};" in header
    assert f"#define VENEER_ABI {native.ABI}\n" in header
