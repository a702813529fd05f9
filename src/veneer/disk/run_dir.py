"""The folder of one run.

recipe.yaml           every key with the value in force
events.jsonl          a line a step
checkpoints/step-N/   what step N + 1 needs: parameters, optimizer, randomness; written whole or not at all
adapter/              the result
result.json           the run's figures; there only when the run is done
"""

import json
import shutil
from pathlib import Path
from typing import Any

from veneer.disk.atomic import replacing, write_json
from veneer.errors import ConfigError, DiskError


class RunDir:
    """Paths of a run, and its files as plain data."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.recipe = self.root / "recipe.yaml"
        self.events = self.root / "events.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.adapter = self.root / "adapter"
        self.result = self.root / "result.json"

    def begin(self, recipe: str) -> None:
        """Take the folder for this recipe.  Raises ConfigError if it holds a run of another one, or other files."""
        if self.recipe.exists():
            before = self.recipe.read_text(encoding="utf-8")
            if before != recipe:
                raise ConfigError(_changed(self.root, before, recipe))
            return
        if self.root.is_dir() and any(self.root.iterdir()):
            raise ConfigError(f"{self.root} holds files of something else; give the run a folder of its own (run: ...)")
        with replacing(self.recipe) as temporary:
            temporary.write_text(recipe, encoding="utf-8")

    def done(self) -> dict[str, Any] | None:
        """The figures of a run that ended, else None."""
        if not self.result.exists():
            return None
        figures: dict[str, Any] = json.loads(self.result.read_text(encoding="utf-8"))
        return figures

    def finish(self, figures: dict[str, Any]) -> None:
        """Mark the run as done."""
        write_json(self.result, figures)

    def append(self, event: dict[str, Any]) -> None:
        """Add a line to the events."""
        try:
            with self.events.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise DiskError(
                f"{self.events} was not written: {error.strerror}. The last checkpoint is whole."
            ) from error

    def read_events(self) -> list[dict[str, Any]]:
        """Every whole line; one cut short by a crash is passed over."""
        events = []
        for line in self.events.read_text(encoding="utf-8").splitlines() if self.events.exists() else []:
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
        return events

    def rewind(self, step: int) -> None:
        """Forget events after `step`: they will happen again."""
        kept = [e for e in self.read_events() if e.get("step", 0) <= step]
        with replacing(self.events) as temporary:
            temporary.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after `step` steps lies."""
        return self.checkpoints / f"step-{step}"

    def newest_checkpoint(self) -> Path | None:
        """The last whole checkpoint; half-written ones have other names and are cleared away."""
        for leftover in self.checkpoints.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return max(self._checkpoints(), key=_step, default=None)

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints."""
        for old in sorted(self._checkpoints(), key=_step)[:-keep]:
            shutil.rmtree(old)

    def _checkpoints(self) -> list[Path]:
        return [p for p in self.checkpoints.glob("step-*") if p.is_dir()]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _changed(root: Path, before: str, after: str) -> str:
    old, new = before.splitlines(), after.splitlines()
    lines = [f"  - {x}" for x in old if x not in new] + [f"  + {x}" for x in new if x not in old]
    return "\n".join(
        [
            f"{root} holds a run of another recipe; what differs (- there, + asked for):",
            *lines,
            "Give this recipe another folder (run: ...), or remove that one.",
        ]
    )
