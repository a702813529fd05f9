"""Where a model computes: the one module that knows devices.

Memory, random state, synchronization and number types answer the same calls on a CPU and on an accelerator.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from veneer import machine
from veneer.errors import ConfigError, did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ["cpu", "cuda", "mps"]
NAMES = "auto, cpu, cuda, cuda:N or mps"


@dataclass(frozen=True)
class Device:
    """A torch device and what veneer asks of it."""

    torch_device: torch.device

    def __str__(self) -> str:
        return str(self.torch_device)

    @property
    def is_cpu(self) -> bool:
        return self.torch_device.type == "cpu"

    @property
    def is_accelerator(self) -> bool:
        """Whether kernels are launched on it one by one while the CPU goes on."""
        return self.torch_device.type not in ("cpu", "meta")

    @property
    def _module(self) -> Any:
        """torch.cuda, torch.mps, ..."""
        return getattr(torch, self.torch_device.type)

    @property
    def _index(self) -> list[torch.device]:
        """The argument of functions of `_module` that take a device; those of MPS, which has only one, do not."""
        return [] if self.torch_device.index is None else [self.torch_device]

    def dtype(self, word: str | torch.dtype) -> torch.dtype:
        """A torch dtype for a recipe's word; "auto" is the faster one here.  Raises ConfigError for any other word."""
        if isinstance(word, torch.dtype):
            return word
        if word == "auto":
            word = machine.compute_dtype() if self.is_cpu else "bfloat16"
        if word not in DTYPES:
            raise ConfigError(
                f"there is no dtype {word!r}{did_you_mean(word, DTYPES)} Known: auto, {', '.join(DTYPES)}."
            )
        return DTYPES[word]

    @property
    def wide_dtype(self) -> torch.dtype:
        """What long sums are added up in: float64, or float32 where the device has none, as MPS."""
        return torch.float64 if self.torch_device.type in ("cpu", "meta", "cuda") else torch.float32

    @property
    def runs_bitsandbytes(self) -> bool:
        """Whether bitsandbytes' kernels for 4-bit weights are the faster ones here, if it is installed."""
        return self.torch_device.type == "cuda"

    def available_bytes(self) -> int | None:
        """Memory that can still be taken; None if the system does not tell."""
        if self.is_cpu:
            return machine.available_bytes()
        if self.torch_device.type == "cuda":
            return int(self._module.mem_get_info(self.torch_device)[0])
        return None

    def used_bytes(self) -> int:
        """Memory in use: the process's resident set, or what torch has reserved on an accelerator."""
        if self.torch_device.type == "cuda":
            return int(self._module.memory_reserved(self.torch_device))
        return machine.rss_bytes()

    def peak_bytes(self) -> int:
        """The largest `used_bytes` so far."""
        if self.torch_device.type == "cuda":
            return int(self._module.max_memory_reserved(self.torch_device))
        return machine.peak_rss_bytes()

    def trim(self) -> None:
        """Give freed host memory back to the system; accelerators keep theirs for the next tensor."""
        if self.is_cpu:
            machine.trim_memory()

    def synchronize(self) -> None:
        """Wait until everything that was started has been computed."""
        if not self.is_cpu and hasattr(self._module, "synchronize"):
            self._module.synchronize(*self._index)

    def add_up_in_one_order(self) -> None:
        """Make torch choose kernels that give the same bits each time, for the whole process; a CPU's do anyway.

        An operator that has no such kernel warns.  CUDA also needs CUBLAS_WORKSPACE_CONFIG, which
        `machine.prepare_process` sets.
        """
        if not self.is_cpu:
            torch.use_deterministic_algorithms(True, warn_only=True)
            deterministic: Any = torch.utils.deterministic
            deterministic.fill_uninitialized_memory = False  # which costs time, and nothing here reads it

    def offloading(self) -> saved_tensors_hooks:
        """Inside, tensors that autograd saves are kept in host memory, pinned where the device copies from it."""
        return save_on_cpu(pin_memory=self.torch_device.type == "cuda")

    def random_state(self) -> dict[str, Tensor]:
        """The state of every generator that a run on this device draws from, by name."""
        state = {"random": torch.get_rng_state()}
        return state if self.is_cpu else state | {"random.device": self._module.get_rng_state(*self._index).cpu()}

    def set_random_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `random_state` returned; a state from another kind of device restores the CPU's part."""
        torch.set_rng_state(state["random"])
        if not self.is_cpu and "random.device" in state:
            self._module.set_rng_state(state["random.device"], *self._index)

    @contextmanager
    def keeping_random_state(self) -> Iterator[None]:
        """Draw random numbers inside, and continue afterwards as if none had been drawn."""
        state = self.random_state()
        try:
            yield
        finally:
            self.set_random_state(state)


CPU = Device(torch.device("cpu"))


def find_device(word: "str | torch.device | Device" = "auto") -> Device:
    """The device that a recipe's word means: auto is CUDA if there is any, else the CPU; MPS only when asked for.

    Raises ConfigError for an unknown word and for a device that this machine does not have.
    """
    if isinstance(word, Device):
        return word
    if isinstance(word, torch.device):
        return Device(word)
    refuse_device_word(word)
    if word == "auto":
        return Device(torch.device("cuda", 0)) if torch.cuda.is_available() else CPU
    kind, _, index = word.partition(":")
    if kind == "cuda" and int(index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"device is {word}, but this machine has {count} CUDA devices that torch can use; give cpu or auto, or "
            "install a CUDA build of torch"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device is mps, but torch finds no MPS here; give cpu or auto")
    return Device(torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device(kind))


def refuse_device_word(word: str) -> None:
    """Raise ConfigError for a word that names no kind of device; whether this machine has it is not asked."""
    kind, _, index = word.partition(":")
    known = word == "auto" or (kind in KINDS and re.fullmatch(r"[a-z]+(:\d+)?", word) and (not index or kind == "cuda"))
    if not known:
        raise ConfigError(f"device is {word!r}{did_you_mean(word, KINDS)} Give {NAMES}.")
