"""Checkpoints: everything the next step depends on, so that an interrupted run ends with the same bytes.

Parameters, optimizer state and the states of the random generators are safetensors; the rest is JSON.  The order of
rows is a pure function of the seed, so the step's number is the position in it.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from veneer.adapters.adapter import Adapter
from veneer.base.base import Base
from veneer.disk.atomic import replacing_folder
from veneer.disk.tensors import writing_tensors
from veneer.errors import ConfigError, DiskError, TrainingError
from veneer.methods.base import config_from
from veneer.methods.restartable import restartable
from veneer.recipe.aliases import as_init
from veneer.train.preflight import InitState


@dataclass
class TrainState:
    """All that changes from step to step."""

    base: Base
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Tokens seen."""
    seconds: float = 0.0
    """Spent in training, over all sessions of the run."""
    fingerprint: str = field(init=False)
    """Of the base's weights before training, which restarts change for the length of a session."""

    def __post_init__(self) -> None:
        self.fingerprint = self.base.fingerprint


def save_checkpoint(folder: Path, state: TrainState, data: str) -> None:
    """Write the state after a step, whole or not at all; `data` is a hash of the examples."""
    tensors = _own(state.adapter)
    for path, delta in restartable(state.adapter.deltas).items():
        tensors |= {f"past.{path}:{name}": t for name, t in delta.past.items()}
    for index, entries in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in entries.items()}
    tensors |= state.base.device.random_state()
    config, begun = state.adapter.settings, None
    if config is not None and config.data_init is not None:
        begun = {"method": config.method, "settings": asdict(config), "paths": list(state.adapter.deltas)}
    facts = {
        "step": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "threads": torch.get_num_threads(),
        "data": data,
        "base": state.fingerprint,
        "begun": begun,
    }
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with replacing_folder(folder) as temporary:
        with writing_tensors(temporary / "state.safetensors", specs) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        (temporary / "state.json").write_text(json.dumps(facts), encoding="utf-8")


def init_state_in(folder: Path) -> InitState | None:
    """What a checkpoint's init settled from data, if it did.  Raises DiskError for a damaged checkpoint."""
    try:
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8")).get("begun")
        return facts and InitState(config_from(*as_init(facts["method"], facts["settings"])), list(facts["paths"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> DiskError:
    return DiskError(
        f"checkpoint {folder} cannot be read ({type(error).__name__}: {error}); remove it to go on from an earlier "
        "one, or from the start"
    )


def load_checkpoint(folder: Path, state: TrainState, data: str) -> str | None:
    """Restore the state; returns the reason why the run may not end with the same bytes, if there is one.

    Raises TrainingError if the rows, the base model or the parameters are not those of the checkpoint, DiskError if it
    is damaged; the state is then as it was.
    """
    try:
        tensors = load_file(folder / "state.safetensors")
        facts: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        random = {name: t for name, t in tensors.items() if name in ("random", "random.device")}
        step, tokens, seconds = facts["step"], facts["tokens"], facts["seconds"]
        rows, base = facts["data"], facts["base"]
        _ = random["random"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    if rows != data:
        raise TrainingError(
            f"the training rows are not those of checkpoint {folder}; put the old file back, or start a new run"
        )
    if base != state.fingerprint:
        raise TrainingError(
            f"the base model's weights are not those of checkpoint {folder}; put the old ones back, or start a new run"
        )
    _restore_adapter(folder, state, tensors)
    _restore_optimizer(state.optimizer, tensors)
    state.base.device.set_random_state(random)
    state.step, state.tokens, state.seconds = step, tokens, seconds
    before, now = facts.get("threads"), torch.get_num_threads()
    if before is None or before == now:
        return None
    return (
        f"the run began with OMP_NUM_THREADS={before}, now there are {now} threads: the result is as good, but "
        "its bytes differ from those of an uninterrupted run"  # sums are added up in another order
    )


def _own(adapter: Adapter) -> dict[str, Tensor]:
    """Every parameter and buffer of the adapter: views of them, by name."""
    own = {f"parameter.{n.path}:{n.name}": n.parameter.detach() for n in adapter.named()}
    for path, holder in adapter.holders().items():
        own |= {f"buffer.{path}:{name}": buffer for name, buffer in holder.named_buffers()}
    return own


def _restore_adapter(folder: Path, state: TrainState, tensors: dict[str, Tensor]) -> None:
    adapter, device = state.adapter, state.base.device.torch_device
    named = _own(adapter)
    saved = {k: t for k, t in tensors.items() if k.startswith(("parameter.", "buffer."))}
    differing = sorted(named.keys() ^ saved.keys()) + [
        k for k in named if k in saved and named[k].shape != saved[k].shape
    ]
    if differing:
        raise TrainingError(f"checkpoint {folder} is of another adapter; these differ: {', '.join(differing[:8])}")
    for key, tensor in named.items():
        tensor.copy_(saved[key])
    for path, delta in restartable(adapter.deltas).items():
        own = f"past.{path}:"
        delta.past = {k.removeprefix(own): t.to(device) for k, t in tensors.items() if k.startswith(own)}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
