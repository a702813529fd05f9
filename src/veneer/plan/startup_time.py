"""What a run does before its first step, and at its restarts: how much there is to read, and how long it takes here."""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from veneer.base.device import CPU
from veneer.base.quant_cache import cache_folder, check_cached, is_quantized
from veneer.base.quantize import Quantizer
from veneer.disk.tensors import weight_files
from veneer.errors import DiskError
from veneer.methods.restartable import restartable
from veneer.models.skeleton import build_skeleton
from veneer.plan.meta_model import Plain
from veneer.plan.synthetic_model import like, made_model, pattern
from veneer.storage import Storage, StorageConfig
from veneer.storage.layers import Stored, store_weight
from veneer.train.optim import build_optimizer
from veneer.train.restarts import Restarts, restart_steps


def files_to_load(plain: Plain) -> tuple[list[Path], bool]:
    """The files that hold the weights as they will be loaded, and whether they are still to be quantized."""
    storage = plain.storage
    if storage is None or is_quantized(plain.folder):
        return weight_files(plain.folder), False
    cached = cache_folder(plain.folder, storage)
    try:
        check_cached(cached)
    except DiskError:  # it is not there, or will be made anew
        return weight_files(plain.folder), True
    return weight_files(cached), False


def stored_numbers(model: nn.Module) -> int:
    """Weights of all layers that are kept in a storage."""
    shapes = [m.storage.shape for m in model.modules() if isinstance(m, Stored)]
    return sum(rows * columns for rows, columns in shapes)


def quantizing_seconds(plain: Plain) -> float:
    """Of each number that is quantized, measured on the layers of one block."""
    model = build_skeleton(plain.folder, CPU.dtype(plain.recipe.train.dtype), blocks=1)
    drawn, spent = pattern(), [0.0, 0]

    def timed(w: Tensor, config: StorageConfig, name: str) -> Storage:
        made = like(w, drawn)
        began = time.perf_counter()
        kept = store_weight(made, config, name)
        spent[0] += time.perf_counter() - began
        spent[1] += w.numel()
        return kept

    Quantizer(plain.storage, kept=timed).on_whole_model(model)
    return spent[0] / max(spent[1], 1)


def hashing_seconds() -> float:
    """Of each byte of a quantized copy, which is read once more to be known again; measured on some."""
    some = bytes(1 << 24)
    began = time.perf_counter()
    hashlib.sha256(some)
    return (time.perf_counter() - began) / len(some)


def restarting_seconds(plain: Plain, steps: int) -> float:
    """Of the restart in the middle of a run, when half of its cycles are finished: each takes longer than the last.

    Measured on two blocks; for each number that is trained there.
    """
    model = made_model(plain)
    change = plain.change(model)
    optimizer = build_optimizer(change.named(), plain.recipe.optimizer.model_copy(update={"paged": False}))
    restarts, at = Restarts(plain.recipe, change, steps), _middle(restart_steps(plain.recipe.restarts, steps))
    for _ in range(at[0]):
        for delta in restartable(change.deltas).values():
            delta.remember_()
    return float(restarts.restart_(optimizer, at[1])["seconds"]) / change.n_params()


def _middle(steps: Sequence[int]) -> tuple[int, int]:
    return len(steps) // 2, steps[len(steps) // 2]
