"""The tree keeps its import order, importing it changes nothing, and its parts have tests of their own name."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "veneer"
GROUND = {"errors", "registry", "settings", "machine", "units"}
ORDER = [
    GROUND,
    {"kernels", "disk"},
    {"models", "storage", "methods", "prompts"},
    {"base"},
    {"ranks"},
    {"adapters"},
    {"data"},
    {"generate"},
    {"merge"},
    {"tasks"},
    {"recipe"},
    {"train"},
    {"plan", "evaluate", "analyze"},
    {"serve"},
    {"learn"},
    {"api"},
    {"cli"},
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def rooms_imported_by(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and room of every import of ours in a file, lazy ones too; the root package counts as the room "veneer"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "veneer" else [node.module]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "veneer":
                yield node.lineno, parts[1] if len(parts) > 1 else "veneer"


def offences(source: str, where: str, own: str) -> list[str]:
    if own in ("__init__", "__main__"):
        return []
    found = []
    for line, other in rooms_imported_by(ast.parse(source)):
        if other == own and own not in GROUND:
            continue
        if own in GROUND and other in GROUND:
            continue
        if other not in RANK or RANK[other] >= RANK[own]:
            found.append(f"{where}:{line}: {own} may not import {other}")
    return found


def test_imports_point_one_way() -> None:
    assert [o for f in FILES for o in offences(f.read_text("utf-8"), str(f.relative_to(ROOT)), room(f))] == []


@pytest.mark.parametrize(
    ("own", "line"),
    [
        ("methods", "from veneer.adapters.attach import attach"),
        ("methods", "import veneer"),
        ("data", "from veneer.merge.fold import fold"),
        ("train", "def f():\n    from veneer.cli import main"),
        ("disk", "from veneer import cli"),
    ],
)
def test_the_check_sees_an_import_against_the_order(own: str, line: str) -> None:
    assert offences(line, "x.py", own)


def modules_imported_by(tree: ast.AST) -> Iterator[str]:
    """Every module of ours that a file imports, by dotted name; a name that is imported from one counts as it too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("veneer."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "veneer":
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others; each circle once."""
    found: dict[frozenset[str], list[str]] = {}

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            circle = trail[trail.index(module) :]
            found.setdefault(frozenset(circle), circle)
            return
        for other in sorted(imports.get(module, ())):
            walk(other, [*trail, module])

    for module in imports:
        walk(module, [])
    return list(found.values())


def imports_within_rooms() -> dict[str, set[str]]:
    """Module -> the modules of its own room that it imports; a room's `__init__` gathers and is left out."""
    names = {".".join(["veneer", *f.relative_to(ROOT).with_suffix("").parts]): f for f in FILES if f.stem != "__init__"}
    found = {}
    for name, file in names.items():
        others = set(modules_imported_by(ast.parse(file.read_text("utf-8")))) & names.keys() - {name}
        found[name] = {other for other in others if other.split(".")[1] == name.split(".")[1]}
    return found


def test_no_circle_inside_a_room() -> None:
    assert circles(imports_within_rooms()) == []


def test_a_circle_would_be_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_relative_imports_and_no_utils() -> None:
    for file in FILES:
        assert "utils" not in file.stem
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}:{node.lineno}: relative import"


def test_functions_fit_on_a_screen() -> None:
    long = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > 60:
                    long.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines")
    assert long == []


def test_modules_have_at_most_400_lines() -> None:
    lengths = {str(f.relative_to(ROOT)): len(f.read_text("utf-8").splitlines()) for f in FILES}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def kinds_of_device_asked(source: str) -> list[int]:
    """Lines that compare something with the name of a kind of device, or ask a tensor for another kind than the CPU."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "is_mps", "is_xpu"):
            lines.append(node.lineno)
        if isinstance(node, ast.Compare):
            constants = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant)]
            lines += [node.lineno] if {"cpu", "cuda", "mps"} & {c for c in constants if isinstance(c, str)} else []
    return lines


def test_one_module_knows_the_kinds_of_devices() -> None:
    asked = {str(f.relative_to(ROOT)): kinds_of_device_asked(f.read_text("utf-8")) for f in FILES}
    assert [name for name, lines in asked.items() if lines] == ["base/device.py"]


@pytest.mark.parametrize("line", ["x.is_cuda", "d.type == 'cpu'", "'cuda' != str(d)", "d.type in ('mps', 'cuda')"])
def test_the_check_sees_a_kind_of_device(line: str) -> None:
    assert kinds_of_device_asked(f"if {line}:\n    pass")


def test_importing_changes_nothing_in_the_process() -> None:
    code = (
        "import os, sys, logging, signal, threading, socket\n"
        "def refuse(*a, **k): raise SystemExit('network at import')\n"
        "socket.socket.connect = refuse\n"
        "state = lambda: (dict(os.environ), list(sys.path), list(sys.meta_path), signal.getsignal(signal.SIGINT),\n"
        "                 threading.active_count(), list(logging.root.handlers), sys.excepthook)\n"
        "before = state()\n"
        "import veneer\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "assert state() == before, 'importing veneer changed the process'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
