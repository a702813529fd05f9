"""4-bit weights in blocks with one absmax each, the base of NF4 and FP4; bitsandbytes' layout, byte for byte.

    code = nearest level of w / absmax(block)        w' = level[code] * absmax(block)

Double quantization stores absmax minus its mean in 8 bits, with one float32 per 256 of them.
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; 8-bit map: Dettmers et al. 2021, arXiv:2110.02861.
Differs from the paper: the 8-bit numbers use the signed dynamic map, like the authors' code, not FP8.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from veneer.errors import ConfigError, InputError, ModelError, listed
from veneer.kernels import functorch, ops
from veneer.kernels.checks import BLOCKS
from veneer.kernels.dynamic_quant import dynamic_map
from veneer.kernels.fast_path import FastMatmul
from veneer.kernels.reference import Packed
from veneer.storage import bnb
from veneer.storage.base import Storage, StorageConfig, check_ids, check_matrix

NESTED_BLOCK = 256
"""Absmax values per float32 under double quantization."""
STATE = "quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
TENSORS = ("codes", "absmax", "levels", "nested_absmax", "nested_levels")
"""The first fields of `Packed`, buffers of a FourBit."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class FourBitConfig(StorageConfig):
    """Settings of a 4-bit storage."""

    block: int = 64
    """G: weights that share one absmax; a power of two from 32 to 4096."""
    double_quant: bool = True
    """Store absmax in 8 bits: 4.13 bits per weight instead of 4.5."""

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ConfigError(f"{self.storage}: block is {self.block}, should be one of {', '.join(map(str, BLOCKS))}")


class FourBit(Storage):
    """W (O, D) as 4-bit codes of the flattened W, two to a byte, the earlier in the high nibble."""

    quant_type: ClassVar[str]
    codes: Tensor
    absmax: Tensor
    levels: Tensor
    nested_absmax: Tensor | None
    nested_levels: Tensor | None
    backend: bnb.Backend = "auto"
    """Kernels for products; auto is veneer until `compute_with` says otherwise."""

    def __init__(self, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.block, self.nested_block, self.offset = packed.block, packed.nested_block, packed.offset
        for name in TENSORS:
            self.register_buffer(name, getattr(packed, name), persistent=False)
        self._packed = packed
        self._fast: FastMatmul | None = None

    @classmethod
    @abstractmethod
    def tables(cls) -> tuple[Tensor, Tensor, Tensor]:
        """levels (16,) by code, bounds (15,) rising, order (16,) uint8: the code of each interval between bounds."""

    # ---- quantization

    @classmethod
    def of(cls, w: Tensor, config: FourBitConfig, name: str = "weight") -> Self:
        check_matrix(w, name)
        return cls(cls.pack(w, config.block, config.double_quant, name), (w.shape[0], w.shape[1]), w.dtype)

    @classmethod
    def pack(cls, w: Tensor, block: int, double_quant: bool, name: str) -> Packed:
        levels, bounds, order = (t.to(w.device) for t in cls.tables())
        try:
            codes, absmax = ops.quantize_4bit(w.detach(), bounds, order, block)
        except ConfigError:  # an invalid VENEER_ISA, not the weight
            raise
        except InputError as error:
            raise ModelError(f"{name}: {error}") from error
        if not double_quant:
            return Packed(codes, absmax, levels, None, None, 0.0, NESTED_BLOCK, block)
        offset = absmax.mean()
        if not bool(offset.isfinite()):
            raise ModelError(f"{name}: its numbers are too large for double quantization; set double_quant to false")
        absmax_codes, nested = ops.quantize_absmax(absmax - offset, NESTED_BLOCK)
        nested_levels = dynamic_map().levels.to(w.device)
        return Packed(codes, absmax_codes, levels, nested, nested_levels, float(offset), NESTED_BLOCK, block)

    @property
    def double_quant(self) -> bool:
        """Whether absmax is stored in 8 bits."""
        return self.nested_absmax is not None

    def put_(self, w: Tensor) -> None:
        if tuple(w.shape) != self.shape:
            raise ModelError(f"the new weight is {tuple(w.shape)}, should be {self.shape}")
        packed = self.pack(w.to(self.codes.device), self.block, self.double_quant, "weight")
        self.offset = packed.offset
        for name in TENSORS:
            setattr(self, name, getattr(packed, name))
        self.moved()

    def moved(self) -> None:
        self._fast = None
        tensors = (self.codes, self.absmax, self.levels, self.nested_absmax, self.nested_levels)
        self._packed = Packed(*tensors, self.offset, self.nested_block, self.block)

    # ---- use

    def dense(self, dtype: torch.dtype) -> Tensor:
        return ops.dequantize_4bit(self._packed, self.shape, dtype)

    def compute_with(self, backend: bnb.Backend, name: str = "weight") -> None:
        """Choose the kernels.  Raises ConfigError or ModelError, with `name`, if they do not support this weight."""
        if backend == "bitsandbytes":
            bnb.check(self._packed, self.shape, name)
        self.backend = backend

    def matmul(self, x: Tensor) -> Tensor:
        if self.backend == "bitsandbytes" and not functorch.differentiating():
            return bnb.matmul(x, self._packed, self.shape, self.quant_type)
        if x.dtype == torch.float16:  # no float16 kernel: its range is too small for sums
            return ops.matmul_4bit(x.float(), self._packed, self.shape[0]).half()
        if self._fast is None and not torch.compiler.is_compiling():
            self._fast = FastMatmul(self._packed, *self.shape)
        fast = self._fast
        if fast is not None and fast.accepts(x):
            return fast.matmul(x)
        return ops.matmul_4bit(x, self._packed, self.shape[0])

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        check_ids(ids, self.shape[0])
        at = ids.reshape(-1, 1) * self.shape[1] + torch.arange(self.shape[1], device=ids.device)
        byte = self.codes.view(-1)[at // 2]
        codes = torch.where(at % 2 == 0, byte >> 4, byte & 15)
        values = self.levels[codes.int()] * self._absmax_of(at // self.block)
        return values.to(dtype).view(*ids.shape, self.shape[1])

    def _absmax_of(self, block: Tensor) -> Tensor:
        """float32 absmax of blocks by index."""
        if self.nested_absmax is None or self.nested_levels is None:
            return self.absmax[block]
        level = self.nested_levels[self.absmax[block].int()]
        return level * self.nested_absmax[block // self.nested_block] + self.offset

    # ---- disk

    def tensors(self, name: str) -> dict[str, Tensor]:
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.block,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        out = {name: self.codes.view(-1, 1), f"{name}.absmax": self.absmax, f"{name}.quant_map": self.levels}
        if self.nested_absmax is not None and self.nested_levels is not None:
            out |= {f"{name}.nested_absmax": self.nested_absmax, f"{name}.nested_quant_map": self.nested_levels.clone()}
            state |= {"nested_blocksize": self.nested_block, "nested_dtype": "float32", "nested_offset": self.offset}
        out[f"{name}.{STATE}{self.quant_type}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return out

    @classmethod
    def recognizes(cls, keys: Mapping[str, Tensor], name: str) -> bool:
        if f"{name}.{STATE}{cls.quant_type}" in keys:
            return True
        # a weight without state is NF4's, which then reports the missing key
        stateless = not any(f"{name}.{STATE}{kind}" in keys for kind in KINDS)
        return stateless and cls.quant_type == "nf4" and f"{name}.quant_map" in keys

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], name: str) -> Self:
        mine = {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        state, problems = read_state(mine, cls.quant_type)
        if not problems:
            problems = check_parts(mine, state, tensors.get(name))
        if problems:
            raise ModelError(
                f"{name} is not a complete 4-bit weight in bitsandbytes' layout:\n{listed(problems, 20)}\n"
                "Nothing was loaded."
            )
        nested = "nested_offset" in state
        packed = Packed(
            tensors[name].contiguous().view(-1).view(torch.uint8),
            aligned(mine["absmax"]),
            aligned(mine["quant_map"]),
            aligned(mine["nested_absmax"]) if nested else None,
            aligned(mine["nested_quant_map"]) if nested else None,
            state.get("nested_offset", 0.0),
            state.get("nested_blocksize", NESTED_BLOCK),
            state["blocksize"],
        )
        return cls(packed, (state["shape"][0], state["shape"][1]), DTYPES[state["dtype"]])


def aligned(t: Tensor) -> Tensor:
    """t, or a copy if the file has it at a misaligned address."""
    t = t.contiguous()
    return t if t.data_ptr() % t.element_size() == 0 else t.clone()


def read_state(mine: Mapping[str, Tensor], quant_type: str) -> tuple[dict[str, Any], list[str]]:
    """Parse the JSON of a weight's quantization state; returns it and the problems of it and of the keys."""
    states = [k for k in mine if k.startswith(STATE)]
    known = {*PARTS, *states}
    problems = [f"{k}: not a key of this layout" for k in mine if k not in known]
    if len(states) != 1 or states[0].removeprefix(STATE) not in KINDS:
        found = ", ".join(states) or "none"
        return {}, [*problems, f"there should be one key {STATE}nf4 or {STATE}fp4, found {found}"]
    if mine[states[0]].dtype != torch.uint8:
        return {}, [*problems, f"{states[0]} is {mine[states[0]].dtype}, should be the bytes of JSON, torch.uint8"]
    try:
        state = json.loads(bytes(mine[states[0]].reshape(-1).tolist()), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        return {}, [*problems, f"{states[0]} is not JSON: {error}"]
    if not isinstance(state, dict):
        return {}, [*problems, f"{states[0]} should hold a JSON object, found {type(state).__name__}"]
    return state, [*problems, *check_state(state, quant_type)]


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Parse a JSON object.  Raises ValueError for duplicate keys."""
    keys = [k for k, _ in pairs]
    if twice := sorted({k for k in keys if keys.count(k) > 1}):
        raise ValueError(f"{', '.join(twice)} occurs more than once")
    return dict(pairs)


def check_state(state: Mapping[str, Any], quant_type: str) -> list[str]:
    """Problems of the values of a quantization state."""
    nested = {"nested_blocksize", "nested_dtype", "nested_offset"}
    wanted = {"quant_type", "blocksize", "dtype", "shape"} | (nested if nested & set(state) else set())
    problems = [f"{k}: missing from the quantization state" for k in sorted(wanted - set(state))]
    problems += [f"{k}: not a key of the quantization state" for k in sorted(set(state) - wanted - nested)]
    shape, block = state.get("shape"), state.get("blocksize")
    checks = [
        ("quant_type", state.get("quant_type") == quant_type, repr(quant_type)),
        ("blocksize", is_count(block) and block in BLOCKS, f"one of {', '.join(map(str, BLOCKS))}"),
        ("dtype", state.get("dtype") in tuple(DTYPES), f"one of {', '.join(DTYPES)}"),
        ("shape", is_shape(shape), "two positive numbers"),
        ("nested_blocksize", is_count(state.get("nested_blocksize", 1)), "a positive number"),
        ("nested_dtype", state.get("nested_dtype", "float32") == "float32", "'float32'"),
        ("nested_offset", is_finite(state.get("nested_offset", 0.0)), "a finite number of float32"),
    ]
    return problems + [f"{k} is {state[k]!r}, should be {want}" for k, fits, want in checks if k in state and not fits]


def is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_count, value))


def is_finite(value: Any) -> bool:
    return type(value) in (float, int) and abs(value) <= torch.finfo(torch.float32).max


def check_parts(mine: Mapping[str, Tensor], state: Mapping[str, Any], codes: Tensor | None) -> list[str]:
    """Problems of the tensors, given a valid state."""
    n = state["shape"][0] * state["shape"][1]
    blocks = -(-n // state["blocksize"])
    nested = "nested_offset" in state
    wanted = {"absmax": (blocks, torch.uint8 if nested else torch.float32), "quant_map": (16, torch.float32)}
    if nested:
        wanted["nested_absmax"] = (-(-blocks // state["nested_blocksize"]), torch.float32)
        wanted["nested_quant_map"] = (256, torch.float32)
    size = 0 if codes is None else codes.numel() * codes.element_size()
    problems = [f"{k}: missing" for k in wanted if k not in mine]
    problems += [f"{k}: present, but the state is not nested" for k in mine if k in PARTS and k not in wanted]
    if size != (n + 1) // 2:
        problems.append(f"the codes hold {size} bytes, a weight of {tuple(state['shape'])} has {(n + 1) // 2}")
    for key, (count, dtype) in wanted.items():
        if key not in mine:
            continue
        part = mine[key]
        if tuple(part.shape) != (count,) or part.dtype != dtype:
            problems.append(f"{key} is {tuple(part.shape)} {part.dtype}, should be ({count},) {dtype}")
        elif part.is_floating_point() and not bool(part.isfinite().all()):
            problems.append(f"{key} holds numbers that are not finite")
    return problems
