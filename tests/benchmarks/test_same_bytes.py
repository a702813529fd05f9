"""The script on a made repository, whose `veneer train` writes bytes that one commit and a file decide."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.same_bytes import RECIPES, recipe_text
from veneer.recipe.load import load_recipe

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "same_bytes.py"
FAKE = """
import pathlib, sys, time, yaml
recipe = yaml.safe_load(pathlib.Path(sys.argv[2]).read_text())
run = pathlib.Path(recipe["run"])
(run / "adapter" / "part").mkdir(parents=True, exist_ok=True)
if run.name == "int8":
    sys.exit("veneer: no int8 today\\n  for want of a nail")
if run.name == "interrupted" and not (run / "events.jsonl").exists():
    (run / "events.jsonl").write_text("{}\\n" * 5)
    time.sleep(60)
(run / "adapter" / "adapter_model.safetensors").write_bytes(b"the same")
(run / "adapter" / "part" / "adapter_model.safetensors").write_bytes(b"BYTES" if run.name == "dora" else b"the same")
"""


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Its last commit writes other bytes for dora than the one before; int8 fails in both."""
    root = tmp_path / "repository"
    files = {
        "benchmarks/report.py": "import json\ndef closing_line(figures): print(json.dumps(figures))\n",
        "tests/conftest.py": "def make_model(folder, **changes): folder.mkdir()\n",
        "src/veneer/__init__.py": "",
        "src/veneer/__main__.py": FAKE,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(tmp_path, "init", "--quiet", str(root))
    for text in (FAKE, FAKE.replace("BYTES", "other bytes")):
        (root / "src/veneer/__main__.py").write_text(text)
        git(root, "add", ".")
        git(root, "commit", "--quiet", "--message", "a commit")
    return root


def run(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--checkout", str(repository), *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_equal_files_are_the_same_after_an_interruption_too(repository: Path) -> None:
    done = run(repository, "--against", "HEAD~1", "--only", "lora", "interrupted")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[:2] == ["lora              same", "interrupted       same"]
    assert json.loads(done.stdout.splitlines()[-1])["same"] == 2


def test_a_part_that_differs_and_a_recipe_that_fails_are_told(repository: Path) -> None:
    done = run(repository, "--against", "HEAD~1", "--only", "dora", "int8")
    assert done.returncode == 1, done.stderr
    dora, int8, closing = done.stdout.splitlines()
    assert dora.startswith("dora              DIFFERS part/adapter_model.safetensors ")
    hashes = [word for word in dora.split() if len(word.strip(",")) == 64]
    assert len(hashes) == 2 and hashes[0] != hashes[1]
    assert int8 == "int8              failed here: veneer: no int8 today; there: veneer: no int8 today"
    assert json.loads(closing)["recipes"].keys() == {"dora", "int8"}


def test_an_unknown_revision_is_refused_and_no_worktree_is_left(repository: Path) -> None:
    done = run(repository, "--against", "nowhere")
    assert done.returncode == 1 and "git made no worktree of nowhere" in done.stderr
    run(repository, "--against", "HEAD", "--only", "lora")
    assert [p.name for p in (repository / ".git").glob("worktrees/*")] == []


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(recipe_text(name))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.run, recipe.train.dtype) == (name, "float32")
