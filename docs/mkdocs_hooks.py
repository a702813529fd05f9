"""What the site needs besides mkdocs.yml: pages from outside docs/, folders in the navigation, links to source files.

A link to a file that is no page of the site (source code, a recipe) becomes plain text there.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import notebooks
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/claims/README.md": "benchmarks/claims.md",
    "README.md": "index.md",
    **{f"examples/notebooks/{s.name}": f"notebooks/{s.stem}.md" for s in notebooks.SCRIPTS},
}
"""File of the repository -> its page; README.md's place is taken by docs/index.md."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Put the pages of a folder in place of `folder/*`."""
    pages = sorted([p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")])
    pages += [page for page in OUTSIDE.values() if page != "index.md"]

    def expanded(entry: Any) -> list[Any]:
        if isinstance(entry, dict):
            return [{title: [e for item in items for e in expanded(item)]} for title, items in entry.items()]
        if not entry.endswith("/*"):
            return [entry]
        return [page for page in pages if posixpath.dirname(page) == entry[:-2]]

    config.nav = [e for entry in config.nav for e in expanded(entry)]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside docs/ and the pictures of the claims."""
    for source, page in OUTSIDE.items():
        if page == "index.md":
            continue
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=notebooks.as_page(text) if source.endswith(".py") else text))
    for picture in sorted((ROOT / "benchmarks" / "claims" / "results").glob("*.svg")):
        files.append(File.generated(config, f"benchmarks/results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    here = page.file.src_uri
    source = next((s for s, p in OUTSIDE.items() if p == here and p != "index.md"), f"docs/{here}")

    def link(found: re.Match[str]) -> str:
        mark, text, target, anchor = found[1], found[2], found[3], found[4] or ""
        if "://" in target:
            return found[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        goal = OUTSIDE.get(file) or file.removeprefix("docs/")
        if mark and file.startswith("benchmarks/claims/results/"):
            goal = file.replace("claims/results", "results")
        if file not in OUTSIDE and not mark and not (file.startswith("docs/") and (ROOT / file).is_file()):
            return text
        return f"{mark}[{text}]({posixpath.relpath(goal, posixpath.dirname(here) or '.')}{anchor})"

    return LINK.sub(link, markdown)
