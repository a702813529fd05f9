"""How long a recipe takes, without its weights: parts that were measured on two blocks, put together for every
micro-batch of the run as its rows really fill it.

Not counted are loading, quantizing a base for the first time, and what a restart does.  Blocks are counted as if deltas
were on all of them.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from veneer import machine
from veneer.adapters.quantized_dir import cache_folder
from veneer.data.pack import Batch
from veneer.disk.readahead import BUFFERS
from veneer.disk.tensors import weight_files
from veneer.models.blocks import blocks_of
from veneer.plan.calibrate import RUNS, Pieces, pieces
from veneer.plan.kept import kept
from veneer.plan.load import Load, batch_of, line_through, load_of, representatives
from veneer.plan.memory import Estimate
from veneer.plan.rates import read_rate, write_rate
from veneer.plan.skeleton import Plain, base_bytes
from veneer.plan.stepping import optimizer_seconds
from veneer.train.held_out import micro_batches
from veneer.train.prepare import Plan, Rows
from veneer.train.recompute import chosen_blocks
from veneer.train.settings import Recipe
from veneer.train.step import ROUND

Ran = Callable[[int], None]


@dataclass(frozen=True)
class Times:
    """Seconds, by what they are spent on."""

    steps: list[float]
    """Of each step."""
    evaluation: float
    """Of all measurements of the evaluation loss together."""
    saving: float
    """Of all checkpoints and the adapter."""
    read_rate: float | None = None
    """Bytes a second that the disk reads, where weights are paged."""
    waiting: float = 0.0
    """Of a mean step, spent on waiting for the disk."""

    @property
    def seconds_a_step(self) -> float:
        return sum(self.steps) / len(self.steps)

    @property
    def total(self) -> float:
        return sum(self.steps) + self.evaluation + self.saving


class Clock:
    """Times of one recipe's micro-batches."""

    def __init__(self, recipe: Recipe, rows: Rows, order: Plan, folder: Path, ran: Ran) -> None:
        self.recipe, self.rows, self.order, self.folder, self._ran = recipe, rows, order, folder, ran
        self.plain = Plain.of(recipe)
        self.model = self.plain.model()
        self.blocks = len(blocks_of(self.model))
        again = len(chosen_blocks(self.model, recipe.train.recompute))
        self.counts = {kind: n for kind, n in ((False, self.blocks - again), (True, again)) if n}
        self.multiple = ROUND if recipe.data.packing else 1
        loads = {tuple(m): self._load(m, rows.examples) for step in order for m in step}
        self.loads = [[loads[tuple(m)] for m in step] for step in order]
        self.chosen = representatives(list(loads.values()))
        self.measured = [{kind: self._pieces(load, kind) for kind in self.counts} for load in self.chosen]
        self.read = 0.0
        """Seconds to read a block's paged weights."""

    def _load(self, members: Any, examples: Any) -> Load:
        return load_of(members, examples, self.multiple, self.model.config.get_text_config().hidden_size)

    def _pieces(self, load: Load, again: bool) -> Pieces:
        batch = batch_of(load, self.rows.examples, self.multiple)

        def measure() -> dict[str, float]:
            return asdict(pieces(self.plain, batch, again, self.folder, self._ran))

        return Pieces(**kept({"batch": _lengths(batch), "recomputed": again, **facts(self.plain)}, measure))

    def _sum(self, seconds: Callable[[dict[bool, Pieces]], float]) -> Callable[[float], float]:
        """A line through what was measured: work -> seconds."""
        points = [(load.work, seconds(found)) for load, found in zip(self.chosen, self.measured, strict=True)]
        return line_through(points)

    def body(self, *, read: float = 0.0) -> Callable[[float], float]:
        """Work -> seconds of all blocks, forward and backward, each at least as long as it is read."""
        waits = max(1 - BUFFERS / self.blocks, 0.0)  # those in the buffers when the direction turns are there

        def seconds(found: dict[bool, Pieces]) -> float:
            inside = 0.0
            for kind, n in self.counts.items():
                for taken in (found[kind].forward, found[kind].backward):
                    inside += n * (waits * max(taken, read) + (1 - waits) * taken)
            return min(p.outside for p in found.values()) + inside

        return self._sum(seconds)

    def forward(self) -> Callable[[float], float]:
        """Work -> seconds without a gradient."""
        return self._sum(lambda found: min(p.outside + self.blocks * max(p.forward, self.read) for p in found.values()))

    def mean(self, name: str) -> float:
        """A piece that does not depend on the work."""
        values = [getattr(p, name) for found in self.measured for p in found.values()]
        return float(sum(values) / len(values))


def times(recipe: Recipe, rows: Rows, order: Plan, found: Estimate, ran: Ran = lambda _: None) -> Times:
    """What the recipe takes here on these rows in this order of steps.

    found   its memory
    ran     is told how many more of `most_runs` are done
    Measures what is not in the cache.  Raises ModelError and ConfigError as training would.
    """
    folder = next(p for p in [Path(recipe.run).absolute(), *Path(recipe.run).absolute().parents] if p.is_dir())
    clock = Clock(recipe, rows, order, folder, ran)
    passes = 2 if recipe.optimizer.in_backward and recipe.train.clip else 1
    stepping = _stepping(clock, found, folder)
    rate = None
    if recipe.memory.page_weights:
        rate = read_rate(_paged_file(clock.plain))
        clock.read = base_bytes(clock.model)["blocks"] / clock.blocks / rate
    alone, waited = clock.body(), clock.body(read=clock.read)
    head, beside = clock.mean("head"), clock.mean("change") * clock.blocks + stepping
    steps = [
        beside + passes * sum(waited(load.work) + head * load.supervised for load in loads) for loads in clock.loads
    ]
    waiting = passes * sum(waited(load.work) - alone(load.work) for loads in clock.loads for load in loads)
    machine.trim_memory()
    return Times(steps, _evaluating(clock), _saving(recipe, len(order), found, folder), rate, waiting / len(steps))


def most_runs(recipe: Recipe) -> int:
    """How often a micro-batch may be timed."""
    return 2 * (1 + RUNS) * (1 if isinstance(recipe.train.recompute, bool) else 2)


def facts(plain: Plain) -> dict[str, Any]:
    """What the seconds of a block depend on, besides the batch and the machine."""
    recipe, storage = plain.recipe, plain.storage
    return {
        "config": (plain.folder / "config.json").read_text(encoding="utf-8"),
        "dtype": recipe.train.dtype,
        "storage": None if storage is None else [storage.settings, storage.backend],
        "method": recipe.method.model_dump(mode="json"),
        "prompt": recipe.prompt.model_dump(mode="json"),
        "optimizer": [recipe.optimizer.name, recipe.optimizer.bits, recipe.optimizer.in_backward],
        "packing": recipe.data.packing,
        "page_activations": recipe.memory.page_activations,
    }


def _lengths(batch: Batch) -> list[list[int]]:
    return [batch.starts.tolist(), [len(batch.targets)]]


def _stepping(clock: Clock, found: Estimate, folder: Path) -> float:
    paged = bool(found.droppable_bytes)
    like = clock.plain.change(clock.plain.model(2)).named()

    def measure() -> dict[str, float]:
        return {"step": optimizer_seconds(clock.recipe, like, found.trained, folder, paged=paged)}

    about = {"trained": found.trained, "paged": paged, "clip": bool(clock.recipe.train.clip), **facts(clock.plain)}
    return kept(about, measure)["step"]


def _paged_file(plain: Plain) -> Path:
    """The largest file of the weights that will be paged; the base's own where they are still to be quantized."""
    storage = plain.storage
    cached = None if storage is None else cache_folder(plain.folder, storage)
    return max(weight_files(cached if cached is not None and cached.is_dir() else plain.folder), key=_size)


def _size(file: Path) -> int:
    return file.stat().st_size


def _evaluating(clock: Clock) -> float:
    rows, total, every = clock.rows.held_out, len(clock.order), clock.recipe.train.eval_every
    if not rows:
        return 0.0
    often = -(-total // every) if every else 1
    forward, head = clock.forward(), clock.mean("head_forward")
    loads = [clock._load(members, rows) for members in micro_batches(rows, clock.recipe)]
    return often * sum(forward(load.work) + head * load.supervised for load in loads)


def _saving(recipe: Recipe, steps: int, found: Estimate, folder: Path) -> float:
    every, kept_ones = recipe.train.checkpoint_every, recipe.train.keep_checkpoints
    often = (steps - 1) // every if every else 0
    written = often * found.disk["checkpoints"] / (kept_ones + 1) + found.disk["adapter"]
    return written / write_rate(folder)
