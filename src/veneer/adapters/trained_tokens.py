"""Rows of chosen tokens, trained in the token embedding and in the output head (PEFT's `trainable_token_indices`).

A tied head uses the embedding's rows; a head of its own has rows of its own, where they are asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapters.layer_view import layer_at
from veneer.adapters.part import PREFIX, Fold, NamedParameter, Part
from veneer.base.base import Base
from veneer.base.vocabulary import mean_row, refuse_stored, share_weight
from veneer.disk.adapter_dir import AdapterFiles

KEY = "token_adapter.trainable_tokens_delta"
"""PEFT's name; despite it, the whole rows and not their change."""


class TokenRows(nn.Module):
    """Rows (n, D), float32, of the tokens with these ids, in ascending order."""

    ids: Tensor

    def __init__(self, ids: Tensor, rows: Tensor) -> None:
        super().__init__()
        order = ids.argsort()
        self.register_buffer("ids", ids[order])
        self.rows = nn.Parameter(rows[order].float())

    def __len__(self) -> int:
        return len(self.rows)

    def embed(self, tokens: Tensor, y: Tensor, scale: float) -> Tensor:
        """tokens (...), y (..., D), their embeddings -> y with these rows in the place of the base's."""
        index = torch.searchsorted(self.ids, tokens.contiguous()).clamp(max=len(self) - 1)
        own = (F.embedding(index, self.rows) * scale).to(y.dtype)
        return torch.where((self.ids[index] == tokens)[..., None], own, y)

    def score(self, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., D), y (..., V), its logits -> y, in place, with the logits of these rows."""
        own = F.linear(x, self.rows.to(x.dtype), None if bias is None else bias[self.ids])
        return y.index_copy_(-1, self.ids, own.to(y.dtype))

    def fold(self, weight: Tensor) -> Tensor:
        """W (V, D) float32 with these rows."""
        return weight.index_copy(0, self.ids.to(weight.device), self.rows.detach().to(weight.device))


class TrainedTokens(Part):
    """Rows by the path of their module: the token embedding, and an untied head."""

    def __init__(self, base: Base, rows: Mapping[str, TokenRows]) -> None:
        super().__init__(base)
        self._rows = dict(rows)

    @property
    def kind(self) -> str:
        return "trained tokens"

    def attach(self) -> None:
        for path, rows in self._everywhere().items():
            module = self.base.network.get_submodule(path)
            hook = _embedding_hook(rows, module, path, self.base) if isinstance(module, nn.Embedding) else _head(rows)
            self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    @property
    def vocabulary(self) -> int:
        return 1 + max(int(rows.ids[-1]) for rows in self._rows.values())

    def holders(self) -> Mapping[str, nn.Module]:
        return self._rows

    def ids(self, without: Sequence[int] = ()) -> dict[str, list[int]]:
        """The trained tokens by the name of their module."""
        every = {path.rpartition(".")[2]: rows.ids.tolist() for path, rows in self._rows.items()}
        return {name: kept for name, ids in every.items() if (kept := [i for i in ids if i not in without])}

    def named(self) -> list[NamedParameter]:
        embedding = self.base.embedding_path
        return [
            NamedParameter(path, "rows", "full", rows.rows, "embedding" if path == embedding else "layer")
            for path, rows in self._rows.items()
        ]

    def tensors(self) -> dict[str, Tensor]:
        return {f"{PREFIX}{path}.{KEY}": rows.rows for path, rows in self._rows.items()}

    def peft_fields(self) -> dict[str, Any]:
        by_name = self.ids()
        alone = list(self._rows) == [self.base.embedding_path]
        return {"trainable_token_indices": next(iter(by_name.values())) if alone else by_name}

    def folds(self) -> dict[str, Fold]:
        made = {id(rows): rows.fold for rows in self._rows.values()}
        return {f"{path}.weight": made[id(rows)] for path, rows in self._everywhere().items()}

    def _everywhere(self) -> dict[str, TokenRows]:
        """Rows by module path, with a tied head that has none of its own."""
        embedding, head = self.base.embedding_path, self.base.head_path
        tied = embedding in self._rows and head is not None and share_weight(self.base)
        return {str(head): self._rows[str(embedding)], **self._rows} if tied else self._rows


def new_trained_tokens(base: Base, ids: Mapping[str, Sequence[int]], fresh: Sequence[int] = ()) -> TrainedTokens:
    """Rows of the tokens `ids`, by module path, that start as the base has them; those of `fresh` at the mean row.

    Raises ConfigError for a module that is quantized.
    """
    refuse_stored(base, [base.network.get_submodule(path) for path in ids])
    made = {}
    for path, chosen in ids.items():
        weight = base.network.get_submodule(path).get_parameter("weight").detach()
        which = sorted(set(chosen))
        start = weight[torch.tensor(which, device=weight.device)].float()
        if new := [index for index, token in enumerate(which) if token in fresh]:
            start[new] = mean_row(weight, min(fresh))
        made[path] = TokenRows(torch.tensor(which, device=weight.device), start)
    return TrainedTokens(base, made)


def read_trained_tokens(base: Base, files: AdapterFiles) -> tuple[TrainedTokens | None, set[str], list[str]]:
    """The rows that a folder brings, the keys of their tensors, and what is wrong with them.

    PEFT also writes the whole embedding and head of a base with a larger vocabulary; of those only the rows that the
    base lacks are taken, and the others have to be the base's.
    """
    used: set[str] = set()
    problems: list[str] = []
    rows: dict[str, dict[int, Tensor]] = {}
    for path in dict.fromkeys(p for p in (base.embedding_path, base.head_path) if p is not None):
        key, whole = f"{PREFIX}{path}.{KEY}", f"{PREFIX}{path}.token_adapter.base_layer.weight"
        found: dict[int, Tensor] = {}
        for name in (whole, f"{PREFIX}{path}.weight"):
            if name in files.tensors and (more := _added_rows(base, path, files.tensors[name])) is not None:
                used.add(name)
                found |= more
        if key in files.tensors:
            used.add(key)
            ids, tensor = _ids_of(files.config.get("trainable_token_indices"), base, path), files.tensors[key]
            width = base.network.get_submodule(path).get_parameter("weight").shape[1]
            if ids is None or tensor.shape != (len(ids), width) or len(set(ids)) < len(ids):
                said = files.config.get("trainable_token_indices")
                problems.append(
                    f"  {key}: {tuple(tensor.shape)}, for the trainable_token_indices {said!r} and a width of {width}"
                )
                continue
            found |= dict(zip(ids, tensor, strict=True))
        if found and not (share_weight(base) and rows):
            rows[path] = found
    if problems or not rows:
        return None, used, problems
    refuse_stored(base, [base.network.get_submodule(path) for path in rows])
    device = base.device.torch_device
    made = {
        p: TokenRows(torch.tensor(list(r)).to(device), torch.stack(list(r.values())).to(device))
        for p, r in rows.items()
    }
    return TrainedTokens(base, made), used, []


def _added_rows(base: Base, path: str, weight: Tensor) -> dict[int, Tensor] | None:
    """By id, the rows of a whole weight that the base lacks; None if it is not the base's weight with rows added."""
    own = base.network.get_submodule(path)._parameters.get("weight")
    if own is None or own.dim() != 2 or len(weight) < len(own) or weight.shape[1:] != own.shape[1:]:
        return None
    same = torch.equal(weight[: len(own)].to(own.device, torch.bfloat16), own.detach().to(torch.bfloat16))
    return dict(enumerate(weight[len(own) :], len(own))) if same else None


def _ids_of(given: Any, base: Base, path: str) -> list[int] | None:
    """PEFT's trainable_token_indices for the module at `path`: a list for the embedding, or lists by name."""
    if isinstance(given, dict):
        own = [ids for name, ids in given.items() if path.endswith(name)]
        given = own[0] if own else next(iter(given.values()), None) if share_weight(base) else None
    if not isinstance(given, list) or not given or not all(isinstance(i, int) and i >= 0 for i in given):
        return None
    return given


Hook = Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], Tensor]


def _embedding_hook(rows: TokenRows, module: nn.Module, path: str, base: Base) -> Hook:
    scale = layer_at(base.network, path).embed_scale

    def embed(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
        return rows.embed(inputs[0] if inputs else next(iter(named.values())), output, scale)

    return embed


def _head(rows: TokenRows) -> Hook:
    def score(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
        x = inputs[0] if inputs else next(iter(named.values()))
        return rows.score(x, output, module._parameters.get("bias"))

    return score
