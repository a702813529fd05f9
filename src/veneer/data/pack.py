"""Examples into steps and micro-batches, and a micro-batch into tensors.

Documents lie end to end in one row without padding; positions start again at each, and attention is kept within each
by `starts`. The plan is a pure function of its arguments, so a resumed run finds the same batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from veneer.data.example import Example
from veneer.errors import ConfigError, DataError


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of S documents, N tokens in all."""

    input_ids: Tensor
    """(1, N) int64."""
    position_ids: Tensor
    """(1, N) int64, 0 at the first token of each document."""
    starts: Tensor
    """(S + 1,) int64: document s is tokens starts[s] to starts[s + 1]."""
    supervised: Tensor
    """(M,) int64, rising: positions whose next token is a trained target; never a document's last."""
    targets: Tensor
    """(M,) int64: the token after each of `supervised`."""

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device`, except `starts`, which the layout of documents needs on the CPU."""
        names = ("input_ids", "position_ids", "supervised", "targets")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def plan_batches(
    lengths: Sequence[int],
    *,
    max_length: int,
    tokens_per_step: int,
    seed: int,
    epoch: int,
    packing: bool = True,
    micro_batch_tokens: int | None = None,
) -> list[list[list[int]]]:
    """Steps of micro-batches of indices into `lengths`; each index exactly once.

    tokens_per_step      a step ends where its tokens come closest; the last may be short
    micro_batch_tokens   most tokens in a micro-batch; none: max_length, at least 2048. A longer document stands alone
    packing              false: one document a micro-batch, the slow twin of the same steps

    The order is shuffled by (seed, epoch); inside a step micro-batches get documents of similar length (attention pads
    to the longest of a micro-batch), the longest first. Raises ConfigError, DataError for numbers out of range.
    """
    most = micro_batch_tokens if micro_batch_tokens is not None else max(max_length, 2048)
    if tokens_per_step < 1 or most < 1:
        raise ConfigError(
            f"tokens_per_step and micro_batch_tokens must be at least 1, got {tokens_per_step} and {most}"
        )
    sizes = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((sizes < 1) | (sizes > max_length))
    if len(wrong):
        at = int(wrong[0])
        raise DataError(f"example {at} has {sizes[at]} tokens, outside 1 to max_length = {max_length}")
    order = np.random.Generator(np.random.PCG64([seed % 2**64, epoch])).permutation(len(sizes))
    steps = _steps(order, sizes, tokens_per_step)
    if not packing:
        return [[[int(i)] for i in step] for step in steps]
    return [_micro_batches(step, sizes, most) for step in steps]


def _steps(
    order: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], tokens_per_step: int
) -> list[npt.NDArray[np.int64]]:
    """Cut the order where the running total is closest to tokens_per_step, at least one document each."""
    totals = np.concatenate([[0], np.cumsum(sizes[order])])
    steps, begin = [], 0
    while begin < len(order):
        wanted = totals[begin] + tokens_per_step
        end = max(int(np.searchsorted(totals, wanted)), begin + 1)  # the first total that reaches it
        if end > len(order):
            end = len(order)
        elif end > begin + 1 and wanted - totals[end - 1] < totals[end] - wanted:
            end -= 1
        steps.append(order[begin:end])
        begin = end
    return steps


def _micro_batches(step: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], most: int) -> list[list[int]]:
    """As few runs of the documents sorted by length as `most` allows, as even as that number allows."""
    by_length = step[np.argsort(-sizes[step], kind="stable")]
    totals = np.concatenate([[0], np.cumsum(sizes[by_length])])
    fewest, low, high = len(_cuts(totals, most)), int(sizes[by_length[0]]), most
    while low < high:  # the smallest limit that still gives as few
        middle = (low + high) // 2
        if len(_cuts(totals, middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    cuts = [0, *_cuts(totals, high)]
    return [by_length[a:b].tolist() for a, b in pairwise(cuts)]


def _cuts(totals: npt.NDArray[np.int64], most: int) -> list[int]:
    """Where to cut so that no run exceeds `most`, unless it is a single document."""
    cuts, begin = [], 0
    while begin < len(totals) - 1:
        begin = max(int(np.searchsorted(totals, totals[begin] + most, side="right")) - 1, begin + 1)
        cuts.append(begin)
    return cuts


def collate(examples: Sequence[Example], multiple: int = 1) -> Batch:
    """Lay documents end to end.

    multiple    N is rounded up to a multiple of this by a last document of zeros that nothing is learned from: the
                matrix library keeps code and memory for every N it meets, so few different ones are better than many
    """
    lengths = np.array([len(e) for e in examples], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([e.tokens for e in examples]).astype(np.int64)
    mask = np.concatenate([e.supervised for e in examples])
    mask[starts[:-1]] = False  # nothing comes before a document's first token
    if missing := -len(ids) % multiple:
        lengths, starts = np.append(lengths, missing), np.append(starts, len(ids) + missing)
        ids = np.append(ids, np.zeros(missing, dtype=np.int64))
    positions = np.arange(len(ids)) - np.repeat(starts[:-1], lengths)
    at = np.flatnonzero(mask)
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        starts=torch.from_numpy(starts),
        supervised=torch.from_numpy(at - 1),
        targets=torch.from_numpy(ids[at]),
    )
