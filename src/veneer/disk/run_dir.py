"""The folder of one run.

recipe.yaml           every key with its value in this run
events.jsonl          one line per step
checkpoints/step-N/   state after step N: parameters, optimizer, random state; written atomically
adapter/              the result
picked.json           settings that `memory.auto` chose, if any
result.json           the run's results; exists only when the run is finished
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from veneer.disk.atomic import replacing, write_json
from veneer.errors import ConfigError, DiskError, listed

ABSENT = "absent"
HEADER = "# Written by veneer train: every key of this run with the value in force.\n"


class RunDir:
    """Paths of a run's files, and their contents as plain data."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.recipe = self.root / "recipe.yaml"
        self.events = self.root / "events.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.adapter = self.root / "adapter"
        self.changes = self.root / "picked.json"
        self.result = self.root / "result.json"

    def begin(self, recipe: str, respelled: Callable[[str], str] = lambda text: text) -> None:
        """Claim the folder for this recipe; a folder of another recipe is reused if no step was completed.

        respelled    turns a stored recipe into today's spelling
        Raises ConfigError if it holds a run of another recipe, or other files.
        """
        before = self._read(self.recipe) if self.recipe.exists() else None
        if before == HEADER + recipe:
            return
        if before is not None and before.startswith(HEADER) and self.trained():
            _refuse_changed(self.root, respelled(before), recipe)
        visible = [p.name for p in self.root.glob("[!.]*")]
        if visible and not (before or "").startswith(HEADER):
            raise ConfigError(
                f"{self.root} holds other files ({listed(sorted(visible), 4, ', ')}); "
                "give the run a folder of its own (run: ...)"
            )
        with replacing(self.recipe) as temporary:
            temporary.write_text(HEADER + recipe, encoding="utf-8")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, creating it if needed.  Raises ConfigError if another process trains in it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise DiskError(
                f"{self.root} cannot be a run's folder: {error.strerror}; name another (run: ...)"
            ) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another process is training in {self.root}; wait for it, or stop it") from None
            except OSError:  # a file system without locks on folders
                pass
            yield
        finally:
            os.close(handle)

    def pick(self, changes: dict[str, Any]) -> None:
        """Store the settings that `memory.auto` chose for this run."""
        if changes:
            write_json(self.changes, changes)
        else:
            self.changes.unlink(missing_ok=True)

    def picked(self) -> dict[str, Any]:
        """The settings that `memory.auto` chose when the run began."""
        return self._object(self.changes, "write into it what recipe.yaml has and your recipe has not") or {}

    def done(self) -> dict[str, Any] | None:
        """The results of a finished run, else None."""
        return self._object(self.result, "remove it to end the run again")

    def finish(self, figures: dict[str, Any]) -> None:
        """Mark the run as done."""
        write_json(self.result, figures)

    def append(self, event: dict[str, Any]) -> None:
        """Append an event."""
        try:
            with self.events.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise DiskError(
                f"{self.events} was not written: {error.strerror}. The last checkpoint is whole."
            ) from error

    def read_events(self) -> list[dict[str, Any]]:
        """All events; a line cut short by a crash is skipped."""
        events = []
        for line in self._read(self.events).splitlines() if self.events.exists() else []:
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
        return events

    def rewind(self, step: int) -> None:
        """Drop events after `step`, and a restart that followed it: a resumed run repeats them."""
        kept = [e for e in self.read_events() if e.get("step", 0) <= step - (e.get("event") == "restart")]
        with replacing(self.events) as temporary:
            temporary.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"step-{step}"

    def newest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint; incomplete ones have other names and are removed."""
        for leftover in self.checkpoints.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        return max(self._checkpoints(), key=_step, default=None)

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints; ignores failures."""
        for old in sorted(self._checkpoints(), key=_step)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        return [p for p in self.checkpoints.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdecimal()]

    def trained(self) -> bool:
        """Whether any step was completed here."""
        return self.result.exists() or bool(self._checkpoints()) or bool(self.read_events())

    def _object(self, path: Path, advice: str) -> dict[str, Any] | None:
        """A JSON file's contents; None if it does not exist."""
        try:
            value: dict[str, Any] | None = json.loads(self._read(path)) if path.exists() else None
        except ValueError as error:
            raise DiskError(f"{path} is damaged ({error}); {advice}") from error
        return value

    @staticmethod
    def _read(path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DiskError(f"{path} cannot be read: {error}") from error


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _refuse_changed(root: Path, before: str, after: str) -> None:
    """Raise ConfigError that lists the keys whose values differ."""
    old, new = _flat(yaml.safe_load(before)), _flat(yaml.safe_load(after))
    differing = [key for key in {**old, **new} if old.get(key, ABSENT) != new.get(key, ABSENT)]
    if differing:
        listed = "\n".join(f"  {key} is {old.get(key, ABSENT)} there, {new.get(key, ABSENT)} here" for key in differing)
        raise ConfigError(
            f"{root} holds a run of another recipe:\n{listed}\n"
            "Give this recipe another folder (run: ...), or remove that one."
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted key -> value."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    inner = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items())
    return {key: value for part in inner for key, value in part.items()}
