"""The one attention function, registered with transformers as "veneer".

    use_veneer_attention(network)                                       once, on a network with sdpa
    network(..., **AttentionContext(documents=documents).arguments())   a forward pass with a context

Without a context it is transformers' sdpa, bit for bit. With one, it keeps packed documents apart, or adds virtual
tokens. The context is a keyword argument of every block, so a block recomputed in the backward pass sees the same one.

Packed documents: a row of N tokens holds several documents. Only attention has to know; all other layers work token by
token, without padding. Attention lays out queries, keys and values as (S documents, longest), and each block of query
rows attends to the columns up to its last one. On CPUs this is 3-4 times faster than torch's fused attention, which
runs at a tenth of the rate of a matrix product there. One document at a time with sdpa (the recipe's `packing: false`)
means the same and is slower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from veneer.errors import ModelError

SDPA = "sdpa"
BLOCK = 128
"""Query rows per step; their scores (BLOCK x columns) fit into the cache."""

UNKNOWN = ("softcap", "s_aux", "position_bias")
"""Arguments of some models' attention that cannot be combined with a context."""


class _Name(str):
    """A name that also equals "sdpa", because some architectures compare it.

    For any other name, Gemma 4 skips queries that sdpa needs, and DeepSeek V3.2 leaves its sparse mask to the function.
    """

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(other) in ("veneer", SDPA)

    def __ne__(self, other: object) -> bool:
        return not self == other


NAME = _Name("veneer")


@dataclass(frozen=True)
class Documents:
    """Layout of S packed documents in a row of N tokens.

    take    (S * longest,) the token at each place of the padded layout; padding repeats a document's last token, which
            no other token of it attends to
    put     (N,) the place of each token in the padded layout
    real    (S * longest,) false at padding
    """

    count: int
    longest: int
    take: Tensor
    put: Tensor
    real: Tensor

    @classmethod
    def from_starts(cls, starts: Tensor) -> "Documents":
        """starts (S + 1,) int64: document i is the tokens starts[i] .. starts[i + 1]."""
        lengths = starts.diff()
        longest = int(lengths.max())
        columns = torch.arange(longest, device=starts.device)
        real = columns < lengths[:, None]
        take = starts[:-1, None] + torch.minimum(columns, lengths[:, None] - 1)
        put = real.flatten().nonzero().flatten()
        return cls(len(lengths), longest, take.flatten(), put, real.flatten())

    def to(self, device: torch.device) -> "Documents":
        """Copy to `device`."""
        return Documents(self.count, self.longest, self.take.to(device), self.put.to(device), self.real.to(device))


@dataclass(frozen=True)
class AttentionContext:
    """What the tokens of one forward pass attend to, besides what the attention mask says."""

    documents: Documents | None = None
    """Each token attends within its packed document; None: as the mask says."""
    virtual: Sequence[tuple[Tensor, Tensor]] | None = None
    """For each layer, keys (1, K, n, E) and values (1, K, n, F) of virtual tokens that every token attends to."""
    recorded: dict[int, tuple[Tensor, Tensor]] | None = None
    """Filled with the keys and values of each layer, by its number."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the network's forward.

        With packed documents they include a 4D mask of one element. transformers passes a 4D mask on unchanged; without
        one it would build N x N elements, because the positions restart.
        """
        if self.documents is None:
            return {"attention": self}
        where = self.documents.take.device
        return {"attention": self, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=where)}


def use_veneer_attention(network: Any) -> None:
    """Let `network` accept an `AttentionContext`; do nothing if its attention is not sdpa called by transformers."""
    if network._can_set_attn_implementation():
        for config in (network.config, network.config.get_text_config()):
            if config._attn_implementation == SDPA:
                config._attn_implementation = {"": NAME}  # not of the configs inside it, such as a vision tower's


def other_attention(network: Any) -> str | None:
    """Describe an attention that `use_veneer_attention` cannot replace; None if it can."""
    config = network.config.get_text_config()
    if config._attn_implementation != SDPA:
        cap = getattr(config, "attn_logit_softcapping", None)
        return f"attention {config._attn_implementation!r}" + ("" if cap is None else f" with softcap {cap}")
    return None if network._can_set_attn_implementation() else "an attention of its own"


def check_packable(network: Any) -> None:
    """Raise ModelError for a network that cannot attend within packed documents."""
    other = other_attention(network) if network._supports_attention_backend else "an attention of its own"
    if other is not None:
        raise ModelError(
            f"{type(network).__name__} has {other}, but packed documents need 'sdpa'; set data.packing to false"
        )
    if not isinstance(network.config.get_text_config()._attn_implementation, _Name):
        raise ModelError(
            f"{type(network).__name__} is not prepared for packed documents; call "
            "veneer.models.attention.use_veneer_attention(network) once, or set data.packing to false"
        )


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **others: Any
) -> tuple[Tensor, Any]:
    """transformers' attention interface: query (B, H, T, E), key (B, K, C, E), value (B, K, C, F) -> (B, T, H, F)."""
    context: AttentionContext = others.pop("attention", None) or AttentionContext()
    if context.recorded is not None:
        context.recorded[module.layer_idx] = (key, value)
    front = None if context.virtual is None else context.virtual[module.layer_idx]
    if context.documents is not None or _is_open(attention_mask, key):
        documents = _checked_documents(module, context.documents, attention_mask, key, others)
        return _attend_documents(query, key, value, documents, front, others), None
    if front is not None:
        if unknown := _unknown(others):
            raise ModelError(f"{type(module).__name__} cannot attend to virtual tokens ({', '.join(unknown)})")
        key, value, attention_mask = _with_front(key, value, attention_mask, front, query.shape[2])
        others["is_causal"] = False  # the mask says so, or there is one query
    out: tuple[Tensor, Any] = ALL_ATTENTION_FUNCTIONS[SDPA](module, query, key, value, attention_mask, **others)
    return out


def _unknown(others: dict[str, Any]) -> list[str]:
    return [k for k in UNKNOWN if others.get(k) is not None]


def _is_open(mask: Tensor | None, key: Tensor) -> bool:
    """Whether it is the mask of `AttentionContext.arguments`."""
    return mask is not None and mask.numel() == 1 and key.shape[2] > 1


def _with_front(
    key: Tensor, value: Tensor, mask: Tensor | None, front: tuple[Tensor, Tensor], t: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask with virtual tokens in front, which all T queries attend to."""
    keys, values = (x.to(key.dtype).expand(len(key), -1, -1, -1) for x in front)
    past = key.shape[2] - t
    if mask is None and t > 1:
        mask = torch.ones(t, past + t, dtype=torch.bool, device=key.device).tril(past)[None, None]
    if mask is not None:
        mask = nn.functional.pad(mask, (keys.shape[2], 0), value=True if mask.dtype == torch.bool else 0.0)
    return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2), mask


def _checked_documents(
    module: Any, documents: Documents | None, mask: Tensor | None, key: Tensor, others: dict[str, Any]
) -> Documents:
    """The documents; raises ModelError if the model needs more than this attention does, or lost the context."""
    problems = _unknown(others)
    problems += ["a mask of its own"] if mask is not None and mask.numel() > 1 else []
    problems += ["it passes no documents on"] if documents is None else _hidden_window(module, documents, others)
    if problems or documents is None:
        raise ModelError(
            f"{type(module).__name__} cannot attend within packed documents ({', '.join(problems)}); "
            "set data.packing to false"
        )
    return documents


def _attend_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    front: tuple[Tensor, Tensor] | None,
    others: dict[str, Any],
) -> Tensor:
    """query (1, H, N, E), key and value (1, K, N, E) -> (1, N, H, E)."""
    q, k, v = (_padded(x, documents) for x in (query, key, value))
    out = causal_attention(q, k, v, others["scaling"], others.get("sliding_window"), front)
    n, h, e = query.shape[2], query.shape[1], value.shape[3]
    flat = out.transpose(1, 2).reshape(documents.count * documents.longest, h * e)
    gathered: Tensor = flat if documents.count == 1 else _Gather.apply(flat, documents)  # type: ignore[no-untyped-call]
    return gathered.view(1, n, h, e)


def _hidden_window(module: Any, documents: Documents, others: dict[str, Any]) -> list[str]:
    """Windows shorter than a document that the model applies in its mask and does not pass to its attention."""
    names = [] if "sliding_window" in others else ["sliding_window"]
    limits = {name: getattr(getattr(module, "config", None), name, None) for name in [*names, "attention_chunk_size"]}
    return [f"{name} {limit}" for name, limit in limits.items() if limit is not None and documents.longest > limit]


def _padded(x: Tensor, documents: Documents) -> Tensor:
    """(1, H, N, E) -> (S, H, longest, E)."""
    _, h, n, e = x.shape
    if documents.count == 1:
        return x
    spread: Tensor = _Spread.apply(x.transpose(1, 2).reshape(n, h * e), documents)  # type: ignore[no-untyped-call]
    return spread.view(documents.count, documents.longest, h, e).transpose(1, 2)


class _Spread(torch.autograd.Function):
    """(N, F) tokens -> (S * longest, F) padded; padding passes no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, documents: Documents) -> Tensor:
        ctx.documents = documents
        return x.index_select(0, documents.take)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.documents.put), None


class _Gather(torch.autograd.Function):
    """(S * longest, F) padded -> (N, F) tokens; padded places get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, documents: Documents) -> Tensor:
        ctx.documents = documents
        return x.index_select(0, documents.put)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        d = ctx.documents
        return grad.index_select(0, d.take).mul_(d.real[:, None]), None


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    front: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """q (S, H, T, E), k (S, K, T, E), v (S, K, T, F), H a multiple of K -> (S, H, T, F), in blocks of query rows.

    window    a row attends to at most this many columns, itself included; None: to all up to itself
    front     keys (1, K, n, E) and values (1, K, n, F) of virtual tokens that every row attends to
    """
    s, h, t, e = q.shape
    kv = k.shape[1]
    q = q.reshape(s * kv, h // kv, t, e)
    k, v = k.reshape(s * kv, t, e), v.reshape(s * kv, t, -1)
    before = [x.to(k.dtype).expand(s, -1, -1, -1).flatten(0, 1) for x in front or ()]
    outs = []
    for begin in range(0, t, BLOCK):
        end = min(begin + BLOCK, t)
        first = 0 if window is None else max(0, begin - window + 1)
        rows = q[:, :, begin:end].reshape(s * kv, -1, e)
        bias = _causal_bias(begin, end, first, window, q).repeat(h // kv, 1)
        keys, values = k[:, first:end], v[:, first:end]
        if before:
            keys, values = torch.cat([before[0], keys], 1), torch.cat([before[1], values], 1)
            bias = torch.nn.functional.pad(bias, (before[0].shape[1], 0))
        scores = torch.baddbmm(bias[None].expand(s * kv, -1, -1), rows, keys.transpose(1, 2), alpha=scale)
        out = torch.bmm(scores.softmax(-1), values)
        outs.append(out.view(s * kv, h // kv, end - begin, -1))
    return (torch.cat(outs, 2) if len(outs) > 1 else outs[0]).view(s, h, t, -1)


def _causal_bias(begin: int, end: int, first: int, window: int | None, like: Tensor) -> Tensor:
    """(rows, columns) for rows begin .. end and columns first .. end: 0 where a row attends, -inf elsewhere."""
    rows = torch.arange(begin, end, device=like.device)[:, None]
    columns = torch.arange(first, end, device=like.device)
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


AttentionInterface.register(str(NAME), _attend)
AttentionMaskInterface.register(str(NAME), ALL_MASK_ATTENTION_FUNCTIONS[SDPA])
