"""Which modules get a delta: names by suffix, a regular expression, or `all-linear`; exclusions; a range of layers.

Matching follows PEFT, so that its adapter_config.json means the same here; but a name that matches nothing is an error.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from veneer.adapters.layer_view import frozen_layer
from veneer.errors import TargetError, did_you_mean
from veneer.methods.base import FrozenLayer, Kind
from veneer.models.blocks import output_head

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Targeting:
    """The choice of modules."""

    targets: str | tuple[str, ...] = ALL_LINEAR
    """`all-linear` (every linear layer but the output head), a regular expression for whole paths, or path endings."""
    exclude: str | tuple[str, ...] = ()
    """Modules to leave out: a regular expression, or path endings."""
    layers: tuple[int, ...] = ()
    """Only these block numbers (the first number in a path); empty for all."""
    blocks: tuple[str, ...] = ()
    """Names of the lists that `layers` counts in, such as `layers` or `h`; empty for any."""


def choose(model: nn.Module, targeting: Targeting, kinds: Iterable[Kind], method: str) -> list[str]:
    """Paths of the chosen modules, in the model's order.

    Raises TargetError when a name matches nothing, when nothing is left, or when `method` cannot change a chosen kind.
    """
    allowed = frozenset(kinds)
    every = _layers(model, "module" in allowed)
    problems = [] if targeting.targets == ALL_LINEAR else _unmatched(model, every, targeting.targets, "target")
    problems += _unmatched(model, every, targeting.exclude, "exclude") if targeting.exclude else []
    problems += _absent_layers(every, targeting)
    if problems:
        listed = "\n".join(problems)
        raise TargetError(f"targets do not fit this model:\n{listed}\nIts layers end in: {', '.join(_endings(every))}.")
    chosen = matching(model, targeting, "module" in allowed)
    if not chosen:
        raise TargetError(
            f"targets {targeting.targets!r} with exclude {targeting.exclude!r} and layers {list(targeting.layers)} "
            f"leave no module of {type(model).__name__}. Its layers end in: {', '.join(_endings(every)) or 'none'}."
        )
    unfit = [f"  {p} is a layer of kind {every[p].kind}" for p in chosen if every[p].kind not in allowed]
    if unfit:
        listed = "\n".join(unfit[:8])
        raise TargetError(
            f"method {method} changes layers of kind {', '.join(sorted(allowed))} only, but:\n{listed}\n"
            "Leave them out of method.targets, or take a method that changes them (`veneer list methods`)."
        )
    return chosen


def matching(model: nn.Module, targeting: Targeting, blocks: bool = False) -> list[str]:
    """Paths of the layers that the targeting names, in the model's order; names that match nothing are passed over."""
    every = _layers(model, blocks)
    if targeting.targets == ALL_LINEAR:
        head = output_head(model)
        named = [p for p, layer in every.items() if layer.kind == "linear" and p != head]
    else:
        named = [p for p in every if _matches(p, targeting.targets)]
    return [p for p in named if not _matches(p, targeting.exclude) and _in_layers(p, targeting)]


def all_matching(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Paths of all modules, layers or not, that `targets` (a regular expression or path endings) name."""
    return [path for path, _ in model.named_modules() if path and _matches(path, targets)]


def _layers(model: nn.Module, blocks: bool) -> dict[str, FrozenLayer]:
    return {path: layer for path, m in model.named_modules() if path and (layer := frozen_layer(m, blocks)) is not None}


def _endings(paths: Iterable[str]) -> list[str]:
    return sorted({p.rpartition(".")[2] for p in paths})


def _unmatched(model: nn.Module, every: Iterable[str], targets: str | Sequence[str], what: str) -> list[str]:
    """A complaint for every name that matches nothing, or only modules that are no layers."""
    layers, problems = set(every), []
    for name in (targets,) if isinstance(targets, str) else targets:
        found = all_matching(model, name if isinstance(targets, str) else (name,))
        if not found:
            close = did_you_mean(name, [*_endings(layers), *sorted(layers)])
            problems.append(f"  {what} {name!r} matches no module{close}")
        elif not layers.intersection(found):
            kind = type(model.get_submodule(found[0])).__name__
            problems.append(f"  {what} {name!r} matches {found[0]} ({kind}), no layer that a method can change")
    return problems


def _absent_layers(every: Iterable[str], targeting: Targeting) -> list[str]:
    there = sorted({n for p in every if (n := _layer_number(p, targeting.blocks)) is not None})
    absent = [n for n in targeting.layers if n not in there]
    has = f"has layers {there[0]} to {there[-1]}" if there else "has no numbered layers"
    return [f"  layers {', '.join(map(str, absent))} are not there: the model {has}"] if absent else []


def _matches(path: str, names: str | Sequence[str]) -> bool:
    if isinstance(names, str):
        try:
            return bool(names) and re.fullmatch(names, path) is not None
        except re.error as error:
            raise TargetError(f"{names!r} is not a regular expression: {error}") from error
    return any(path == n or path.endswith("." + n) for n in names)


def _in_layers(path: str, targeting: Targeting) -> bool:
    return not targeting.layers or _layer_number(path, targeting.blocks) in targeting.layers


def _layer_number(path: str, blocks: Sequence[str]) -> int | None:
    """The block's number: the first in the path, or the one that follows a name of `blocks`."""
    if blocks:
        found = next((m for b in blocks if (m := re.match(rf"(?:^|.*?\.){b}\.(\d+)\.", path))), None)
    else:
        found = re.match(r"(?:^|.*?\.)[^.]*\.(\d+)\.", path)
    return int(found[1]) if found else None
