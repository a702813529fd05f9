"""Checkpoints: everything the next step depends on, so that an interrupted run ends with the same bytes.

Parameters, optimizer state and the state of the random generator are safetensors; the rest is JSON. The order of rows
is a pure function of the seed, so the step's number is its position.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from veneer.adapters.attach import Adapter
from veneer.adapters.fingerprint import base_fingerprint
from veneer.disk.atomic import replacing_folder
from veneer.disk.tensors import writing_tensors
from veneer.errors import DiskError, TrainingError


@dataclass
class TrainState:
    """All that changes from step to step."""

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Tokens seen."""
    seconds: float = 0.0
    """Spent in training, over all sessions of the run."""


def save_checkpoint(folder: Path, state: TrainState, data: str) -> None:
    """Write the state after a step, whole or not at all; `data` is a hash of the examples."""
    tensors = _own(state.adapter)
    for index, entries in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in entries.items()}
    tensors["random"] = torch.get_rng_state()
    facts = {
        "step": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "data": data,
        "base": base_fingerprint(state.adapter.model),
    }
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with replacing_folder(folder) as temporary:
        with writing_tensors(temporary / "state.safetensors", specs) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        (temporary / "state.json").write_text(json.dumps(facts), encoding="utf-8")


def load_checkpoint(folder: Path, state: TrainState, data: str) -> None:
    """Put the state back in place.

    Raises TrainingError if the rows, the base model or the parameters are not those of the checkpoint, DiskError if it
    is damaged; the state is then as it was.
    """
    try:
        tensors = load_file(folder / "state.safetensors")
        facts: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        random, step, tokens, seconds = tensors["random"], facts["step"], facts["tokens"], facts["seconds"]
        rows, base = facts["data"], facts["base"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DiskError(
            f"checkpoint {folder} cannot be read ({type(error).__name__}: {error}); remove it to go on from an earlier "
            "one, or from the start"
        ) from error
    if rows != data:
        raise TrainingError(
            f"the training rows are not those of checkpoint {folder}; put the old file back, or start a new run"
        )
    if base != base_fingerprint(state.adapter.model):
        raise TrainingError(
            f"the base model's weights are not those of checkpoint {folder}; put the old ones back, or start a new run"
        )
    _restore_adapter(folder, state.adapter, tensors)
    _restore_optimizer(state.optimizer, tensors)
    torch.set_rng_state(random)
    state.step, state.tokens, state.seconds = step, tokens, seconds


def _own(adapter: Adapter) -> dict[str, Tensor]:
    """Every parameter and buffer of the deltas: views of them, by name."""
    own = {f"parameter.{n.path}:{n.name}": n.parameter.detach() for n in adapter.named()}
    for path, delta in adapter.deltas.items():
        own |= {f"buffer.{path}:{name}": buffer for name, buffer in delta.named_buffers()}
    return own


def _restore_adapter(folder: Path, adapter: Adapter, tensors: dict[str, Tensor]) -> None:
    named = _own(adapter)
    saved = {k: t for k, t in tensors.items() if k.startswith(("parameter.", "buffer."))}
    differing = sorted(named.keys() ^ saved.keys()) + [
        k for k in named if k in saved and named[k].shape != saved[k].shape
    ]
    if differing:
        raise TrainingError(f"checkpoint {folder} is of another adapter; these differ: {', '.join(differing[:8])}")
    for key, tensor in named.items():
        tensor.copy_(saved[key])


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
