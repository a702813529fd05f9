"""Draw the house: every room, its one line, and the import order, as one SVG that is readable in light and dark.

The order is ORDER of tests/test_architecture.py; a room's line is the first one of its docstring. A floor imports only
from floors below it.
"""

import ast
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "veneer"
WIDTH, MARGIN, GAP, PAD, LINE, SIDE = 1000, 24, 10, 12, 17, 150
"""Pixels: the picture, its border, between boxes, inside a box, a line of text; SIDE is the column of the arrow."""
CHARACTER = 7.3
"""Pixels of a character of the small text, generously."""
STYLE = """
    .sky { fill: #f6f8fa; } .floor { fill: #ffffff; stroke: #8c959f; } .ground { fill: #eaeef2; }
    .name { fill: #0a3069; font: 600 15px ui-monospace, monospace; }
    .text { fill: #1f2328; font: 13px system-ui, sans-serif; }
    .note { fill: #59636e; font: 13px system-ui, sans-serif; }
    .arrow { stroke: #59636e; stroke-width: 2; fill: none; }
    @media (prefers-color-scheme: dark) {
      .sky { fill: #0d1117; } .floor { fill: #161b22; stroke: #656d76; } .ground { fill: #21262d; }
      .name { fill: #79c0ff; } .text { fill: #e6edf3; } .note { fill: #9198a1; } .arrow { stroke: #9198a1; }
    }
"""


def order() -> list[list[str]]:
    """The floors from the ground up: rooms that may not import each other share one. Rooms that are not built are left
    out."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    values = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in ("GROUND", "ORDER")
    }
    ground = sorted(ast.literal_eval(values["GROUND"]))
    order = values["ORDER"]
    assert isinstance(order, ast.List)
    floors = [ground if isinstance(floor, ast.Name) else sorted(ast.literal_eval(floor)) for floor in order.elts]
    return [built for floor in floors if (built := [room for room in floor if file_of(room).exists()])]


def file_of(room: str) -> Path:
    """The file whose docstring describes a room: its package's, or the module itself."""
    folder = SOURCE / room
    return folder / "__init__.py" if folder.is_dir() else SOURCE / f"{room}.py"


def line_of(room: str) -> str:
    """What a room is for, in one line."""
    said = ast.get_docstring(ast.parse(file_of(room).read_text(encoding="utf-8")))
    assert said, f"{file_of(room).relative_to(ROOT)} has no docstring"
    return " ".join(said.partition("\n\n")[0].split())


def drawing() -> str:
    """The SVG."""
    floors = order()
    parts, y = [], 76
    for number, rooms in enumerate(reversed(floors)):
        floor, height = _floor(rooms, y, ground=number == len(floors) - 1)
        parts.append(floor)
        y += height + GAP
    bottom, x = y - GAP, WIDTH - SIDE
    note = ("imports point", "down only;", "rooms of one", "floor never", "import each", "other")
    arrow = f'<path class="arrow" d="M{x + 20} 84 V{bottom - 4} m-6 -10 l6 10 l6 -10"/>\n' + "".join(
        f'<text class="note" x="{x + 34}" y="{(84 + bottom) // 2 + LINE * i}">{line}</text>\n'
        for i, line in enumerate(note)
    )
    roof = f'<path class="floor" d="M{MARGIN} 68 L{(x + MARGIN) // 2} 20 L{x} 68 Z"/>\n'
    roof += f'<text class="name" x="{(x + MARGIN) // 2}" y="56" text-anchor="middle">veneer</text>\n'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + MARGIN}" role="img">\n'
        f"<title>The rooms of veneer in their import order, the ground at the bottom</title>\n<style>{STYLE}</style>\n"
        f'<rect class="sky" width="{WIDTH}" height="{bottom + MARGIN}" rx="12"/>\n{roof}{"".join(parts)}{arrow}</svg>\n'
    )


def _floor(rooms: list[str], y: int, *, ground: bool) -> tuple[str, int]:
    """One floor's boxes, side by side, and its height."""
    width = (WIDTH - SIDE - MARGIN - GAP * (len(rooms) - 1)) / len(rooms)
    texts = [textwrap.wrap(line_of(room), int((width - 2 * PAD) / CHARACTER)) for room in rooms]
    height = 2 * PAD + LINE * (1 + max(map(len, texts)))
    boxes = []
    for i, (room, text) in enumerate(zip(rooms, texts, strict=True)):
        x = MARGIN + i * (width + GAP)
        style = "floor ground" if ground else "floor"
        boxes.append(f'<rect class="{style}" x="{x:.0f}" y="{y}" width="{width:.0f}" height="{height}" rx="4"/>\n')
        boxes.append(f'<text class="name" x="{x + PAD:.0f}" y="{y + PAD + 12}">{escape(room)}</text>\n')
        boxes += [
            f'<text class="text" x="{x + PAD:.0f}" y="{y + PAD + 12 + LINE * n}">{escape(line)}</text>\n'
            for n, line in enumerate(text, start=1)
        ]
    return "".join(boxes), height
