"""Count the bytes of tensors on torch's meta device, where they have sizes and no data.

The bytes alive now, and the peak, follow from the code that really trains, for any architecture and method.  Scratch
memory that a kernel allocates and frees inside one operation is not seen, except for that of an exact SVD.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from veneer.methods.svd import svd_scratch


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every new tensor on the meta device counts until its storage is freed.

    known    tensors that exist already and do not count
    A meta tensor asked for its value gives 1; copied into a real tensor, it changes nothing.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        """Bytes alive now."""
        self.peak = 0
        """The most since the last `mark`."""
        self._sizes: dict[int, int] = {}
        self._kept = [t.untyped_storage() for t in known]  # alive, so that their keys are not reused
        self._known = {s._cdata for s in self._kept}

    def mark(self) -> int:
        """Return the peak since the last mark, and start a new one."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0]
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._count(leaf.untyped_storage())
        if func is torch.ops.aten._linalg_svd.default and args[0].is_meta:
            self.peak = max(self.peak, self.live + svd_scratch(*args[0].shape[-2:]))
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
