"""A second device where there is none: `fake:0` computes on the CPU, but refuses tensors of the CPU, as a GPU would.

torch reserves one kind of device, PrivateUse1, for backends outside its source, and such a backend may be written in
Python. Here it is a tensor subclass that holds a CPU tensor, `held`. Every operator passes `run`, which

- refuses operands of both kinds, except where a GPU takes them: copies, indices, and single numbers of the CPU;
- refuses a random generator of the CPU, and draws from a stream of its own;
- refuses float64, as MPS does;
- computes with the held tensors, and puts the results on the fake device.

So code that leaves a tensor behind fails by name, and code that does not gives the CPU's values. `install` changes the
whole process (it renames the backend, registers operators and replaces `torch.inference_mode`) and cannot be undone:
call it in a process of its own, before veneer is imported. The interface is experimental in torch.
"""

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

KIND = "fake"
MIXED = {"aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_"}
"""Operators that a GPU lets take tensors of the CPU too."""
OTHER_LAYOUTS = ("sparse", "quantized", "nested", "from_file", "dep_token")
"""In the names of operators that make no plain tensor."""
launches: Counter[str] = Counter()
"""Operators that were computed for the fake device, by name."""
_stream = torch.Generator().manual_seed(0)
_registered: list[Any] = []  # a torch.library.Library that is collected takes its operators away


class FakeTensor(Tensor):
    """A tensor on `fake:0`: of `held` it shows shape, strides and dtype, but no memory."""

    held: Tensor

    def __new__(cls, held: Tensor) -> "FakeTensor":
        made: FakeTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(KIND, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "veneer":  # whose meaning off the CPU is a composition of torch's operators
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
            return op.redispatch(keys, *args, **(kwargs or {}))
        return run(op, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        raise RuntimeError("a kernel of the CPU asks for the address of a tensor on fake:0")

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: "FakeTensor") -> None:
        self.held = new.held


def run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute `op` for the fake device if an operand lies there or `device=` says so, else for the CPU."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = {id(t.held): t for t in tensors if isinstance(t, FakeTensor)}
    target = kwargs.get("device")
    here = bool(ours) if target is None else torch.device(target).type == KIND
    left_behind = [t for t in tensors if t.dim() and not isinstance(t, FakeTensor)]
    if ours and left_behind and op.name() not in MIXED:
        raise RuntimeError(f"{op}: all tensors should be on the same device, but found fake:0 and cpu")
    if here and (rng := kwargs.get("generator")) is not None and rng.device.type != KIND:
        raise RuntimeError(f"{op}: expected a generator of fake:0, but found one of {rng.device}")
    if here and kwargs.get("dtype") == torch.float64:
        raise TypeError(f"{op}: fake:0 has no float64")
    if here:
        launches[op.name()] += 1
    if here and target is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, FakeTensor) else x, (args, kwargs))
    with torch.no_grad(), _Drawing() if here and torch.Tag.nondeterministic_seeded in op.tags else nullcontext():
        out = op(*args, **kwargs)

    def placed(x: Any) -> Any:
        return ours[id(x)] if id(x) in ours else FakeTensor(x) if isinstance(x, Tensor) else x

    return tree_map(placed, out) if here else out


class _Drawing:
    """Inside, the CPU's default generator stands for the fake device's."""

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.set_rng_state(_stream.get_state())

    def __exit__(self, *raised: object) -> None:
        _stream.set_state(torch.get_rng_state())
        torch.set_rng_state(self.state)


class FakeModule(ModuleType):
    """`torch.fake`, with the functions that torch and veneer ask of torch.cuda and its like."""

    _initialized = True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def device(self, index: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def manual_seed_all(self, seed: int) -> None:
        _stream.manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return _stream.get_state()

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        _stream.set_state(state)


def install() -> None:
    """Let torch know the device `fake`, and veneer's recipes name it."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as setup

    setup(KIND, backend_module=FakeModule(f"torch.{KIND}"))
    torch.inference_mode = torch.no_grad  # type: ignore[misc, assignment]  # under it no subclass sees its operators
    aten = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and not any(layout in name for layout in OTHER_LAYOUTS):
            _register_if_factory(aten, name)
    aten.impl("_copy_from", lambda a, b, _=False: run(torch.ops.aten.copy_.default, (b, a), {}), "PrivateUse1")
    _registered.append(aten)

    from veneer.base import device

    device.KINDS.append(KIND)


def _register_if_factory(aten: Any, full_name: str) -> None:
    """Operators that take a device and no tensor never reach `__torch_dispatch__`, so they are registered by name."""
    name, _, overload = full_name.removeprefix("aten::").partition(".")
    op = getattr(getattr(torch.ops.aten, name), overload or "default")
    types = {a.name: str(a.type) for a in op._schema.arguments}
    if "device" in types and not any("Tensor" in t for t in types.values()):
        aten.impl(full_name.removeprefix("aten::"), lambda *a, **k: run(op, a, k), "PrivateUse1")
