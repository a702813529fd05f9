"""Generated pages are current, links lead somewhere, and what the docs say of the code is so."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import get_args
from xml.etree import ElementTree

import pytest

from tests.docs.blocks import ROOT, blocks
from tests.test_architecture import ORDER
from veneer.methods.base import Role

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "csrc").rglob("*.md")]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))


QUIET = {"NO_MKDOCS_2_WARNING": "1"}


def generator() -> ModuleType:
    import generate

    return generate


def test_generated_pages_are_current() -> None:
    stale = [str(p.relative_to(ROOT)) for p, text in generator().pages().items() if p.read_text("utf-8") != text]
    assert stale == [], "run `make docs`"


def test_a_changed_help_line_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.recipe.settings import Recipe

    module = generator()
    before = module.recipe_page()
    monkeypatch.setattr(Recipe.model_fields["run"], "description", "Something else.")
    after = module.recipe_page()
    assert before != after and "| `run` | text | (needed) | Something else. |" in after


def test_every_key_has_a_help_line_in_the_page() -> None:
    from veneer.recipe.load import keys

    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    for key, text in keys().items():
        assert text, f"{key} has no help"
        assert f"| `{key}` |" in page


def slug(heading: str) -> str:
    """The anchor of a heading, as code hosts make it: lower case, no punctuation, a hyphen for each space."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}


def broken_links(page: Path, text: str) -> list[str]:
    """Links of `page` to files that are not there, or to headings that no page has."""
    broken = []
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)):
        target, _, anchor = link.partition("#")
        goal = page.parent / target if target else page
        if "://" not in link and (not goal.exists() or (anchor and anchor not in anchors(goal))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_would_be_seen() -> None:
    page = ROOT / "docs" / "index.md"
    text = "[a](nowhere.md) [b](plan.md#no-such-heading) [c](cli.md#veneer-train) [d](#the-house) [e](#no)"
    assert broken_links(page, text) == ["nowhere.md", "plan.md#no-such-heading", "#no"]


def test_the_site_builds(tmp_path: Path) -> None:
    """All pages, with every link and anchor of the site, docstrings included; a warning is an error."""
    pytest.importorskip("mkdocs", reason="needs mkdocs, mkdocs-material and mkdocstrings (pip install .[docs])")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **QUIET})
    assert built.returncode == 0, built.stdout + built.stderr
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "doc-signature" in api and "keep it detached under this name" in api, "no signatures or no docstrings"


def test_only_pages_that_are_run_show_commands() -> None:
    for page in PAGES:
        if page.name not in ("README.md", "CONTRIBUTING.md", "tutorial.md"):
            assert {b.language for b in blocks(page)} <= {"text"}, f"{page}: no test runs its blocks"


def test_the_picture_has_every_room_above_those_it_imports() -> None:
    picture = ElementTree.fromstring((ROOT / "docs" / "house.svg").read_text(encoding="utf-8"))
    named = [t for t in picture.iter("{http://www.w3.org/2000/svg}text") if t.get("class") == "name"]
    height = {str(t.text): float(str(t.get("y"))) for t in named}
    assert set(height) == rooms_of_the_tree() | {"veneer"}
    for lower, upper in pairwise([sorted(floor & set(height)) for floor in ORDER if floor & set(height)]):
        assert max(height[room] for room in upper) < min(height[room] for room in lower), (lower, upper)
    assert all(len({height[room] for room in floor & set(height)}) <= 1 for floor in ORDER)


def test_the_picture_would_show_a_room_that_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    import house

    before, order = house.drawing(), house.order()
    monkeypatch.setattr(house, "order", lambda: [*order[:-2], order[-1], order[-2]])
    assert house.drawing() != before


def rooms_of_the_tree() -> set[str]:
    found = {p.name.removesuffix(".py") for p in (ROOT / "src" / "veneer").iterdir() if not p.name.startswith("_")}
    return found - {"py.typed"}


def test_every_room_is_in_the_house() -> None:
    house = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8").partition("## Four ideas")[0]
    table = " ".join(line.split("|")[1] for line in house.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", table)) == rooms_of_the_tree()


def test_the_glossary_has_the_words_of_the_contract() -> None:
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    assert all(role in page for role in get_args(Role))
    words = re.findall(r"^\| ([a-z][\w, -]*) \|", page.partition("Letters for shapes")[0], re.M)
    assert words[1:] == sorted(words[1:], key=str.casefold), "in alphabetical order"


def test_every_environment_variable_is_named() -> None:
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    code = "".join(f.read_text(encoding="utf-8") for f in (ROOT / "src").rglob("*.py"))
    read = set(re.findall(r"\bVENEER_[A-Z_]+\b", code))
    assert read == set(re.findall(r"^\| `(VENEER_[A-Z_]+)` \|", page, re.M))


def test_formats_name_every_file_and_every_key_of_a_run(workplace: Path, tiny_model: Path) -> None:
    import veneer

    (workplace / "rows.jsonl").write_text('{"prompt": "Which city?", "completion": "Rome"}\n' * 8)
    tree = {
        "model": str(tiny_model),
        "data": {"train": "rows.jsonl", "eval": "rows.jsonl"},
        "train": {"steps": 4, "tokens_per_step": 64, "checkpoint_every": 2, "eval_every": 2, "dtype": "float32"},
        "run": "run",
    }
    veneer.train(tree)
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    run = workplace / "run"
    files = {p.name for p in run.rglob("*") if not p.name.startswith(("step-", "."))}
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    named = {key for event in events for key in event}
    named |= json.loads((run / "result.json").read_text()).keys()
    named |= json.loads((run / "adapter" / "veneer.json").read_text()).keys()
    for state in run.rglob("state.json"):
        named |= json.loads(state.read_text()).keys()
    assert {e["event"] for e in events} == {"step", "evaluation"} and "state.safetensors" in files
    assert sorted(x for x in files | named if x not in page) == []


def test_the_help_of_eval_names_every_metric() -> None:
    from veneer.cli.list_ import metrics

    said = generator().help_of("eval")
    assert [m["name"] for m in metrics() if not re.search(rf"\b{m['name']}\b", said)] == []


@pytest.mark.parametrize("page", DECISIONS, ids=lambda p: p.stem)
def test_a_decision_is_one_page_of_three_parts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {page.name[:4]}: ") and len(text.splitlines()) <= 60
    parts = [text.index(f"**{part}.**") for part in ("Context", "Choice", "What would change it")]
    assert parts == sorted(parts)


def test_decisions_are_numbered_without_gaps() -> None:
    assert [int(p.name[:4]) for p in DECISIONS] == list(range(1, len(DECISIONS) + 1))


def test_the_newcomers_answers_exist() -> None:
    page = (ROOT / "docs" / "decisions" / "0015-newcomer-test.md").read_text(encoding="utf-8")
    answers = re.findall(r"^\| \d+ \| .* \| `(\S+)` \|$", page, re.M)
    assert len(answers) == len(set(answers)) == 10
    assert [a for a in answers if not (ROOT / "src" / "veneer" / a).is_file()] == []


@pytest.mark.parametrize("page", [ROOT / "docs" / "concepts.md", DECISIONS[13]], ids=lambda p: p.stem)
def test_the_import_order_is_the_one_enforced(page: Path) -> None:
    drawn = [set(group.split()) for group in blocks(page)[0].text.split("<")]
    assert drawn == ORDER


def test_the_reference_has_every_public_name() -> None:
    import veneer

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert {f"veneer.{n}" for n in veneer.__all__} - {"veneer.__version__"} == set(
        re.findall(r"^### (\S+)$", page, re.M)
    )
