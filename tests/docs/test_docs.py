"""Generated pages are current, links lead somewhere, and what the docs say of the code is so."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from tests.docs.blocks import ROOT, blocks
from tests.test_architecture import ORDER
from veneer.methods.base import Role

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "csrc").rglob("*.md")]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text)
    broken = [x for x in links if "://" not in x and not (page.parent / x.partition("#")[0]).exists()]
    assert broken == []


def test_only_the_readme_shows_commands_to_run() -> None:
    for page in PAGES:
        if page.name not in ("README.md", "CONTRIBUTING.md"):
            assert {b.language for b in blocks(page)} <= {"text"}, f"{page}: only the README's blocks are run"


def test_the_import_order_is_the_one_enforced() -> None:
    page = ROOT / "docs" / "concepts.md"
    drawn = [set(group.split()) for group in blocks(page)[0].text.split("<")]
    assert drawn == ORDER


def test_every_room_is_in_the_house() -> None:
    house = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8").partition("## Four ideas")[0]
    table = " ".join(line.split("|")[1] for line in house.splitlines() if line.startswith("| `"))
    rooms = {p.name.removesuffix(".py") for p in (ROOT / "src" / "veneer").iterdir() if not p.name.startswith("_")}
    assert set(re.findall(r"`(\w+)`", table)) == rooms - {"py.typed"}


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
    from veneer import recipe_from, train_adapter

    (workplace / "rows.jsonl").write_text('{"prompt": "Which city?", "completion": "Rome"}\n' * 8)
    tree = {
        "model": str(tiny_model),
        "data": {"train": "rows.jsonl", "eval": "rows.jsonl"},
        "train": {"steps": 4, "tokens_per_step": 64, "checkpoint_every": 2, "eval_every": 2, "dtype": "float32"},
        "run": "run",
    }
    train_adapter(recipe_from(tree))
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
