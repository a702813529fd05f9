"""Deltas on modules: each hangs on its module by forward hooks.

The network's modules, names and state dict stay as they were; `detach` leaves it bit-identical.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from veneer.adapters.layer_view import is_transposed
from veneer.adapters.part import PREFIX, Fold, NamedParameter, Part
from veneer.adapters.targets import ALL_LINEAR, Targeting, all_matching
from veneer.base.base import Base
from veneer.errors import NotFoldable
from veneer.methods.base import METHODS, Delta, MethodConfig
from veneer.methods.restartable import restartable


class DeltaPart(Part):
    """The deltas of one method, by module path."""

    def __init__(self, base: Base, config: MethodConfig, targeting: Targeting, deltas: Mapping[str, Delta]) -> None:
        super().__init__(base)
        self.config, self.targeting = config, targeting
        self._deltas = dict(deltas)
        network = base.network
        self._embeddings = {p for p in deltas if isinstance(network.get_submodule(p), nn.Embedding)}

    @property
    def kind(self) -> str:
        return self.config.method

    def attach(self) -> None:
        for path, delta in self._deltas.items():
            module = self.base.network.get_submodule(path)
            if type(delta).before is not Delta.before:
                self._hooks.append(module.register_forward_pre_hook(_before(delta), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(_hook(delta), with_kwargs=True))

    @property
    def deltas(self) -> Mapping[str, Delta]:
        return self._deltas

    @property
    def settings(self) -> MethodConfig:
        return self.config

    def holders(self) -> Mapping[str, nn.Module]:
        return self._deltas

    def named(self) -> list[NamedParameter]:
        return [
            NamedParameter(
                path,
                name,
                delta.roles[name.partition(".")[0]],
                parameter,
                "embedding" if path in self._embeddings else "layer",
            )
            for path, delta in self._deltas.items()
            for name, parameter in delta.named_parameters()
        ]

    def refuse_fold(self) -> None:
        for path, delta in self._deltas.items():
            if type(delta).fold is Delta.fold:
                try:
                    delta.fold(Tensor())
                except NotFoldable as error:
                    raise NotFoldable(f"{path}: {error}") from error

    def folds(self) -> dict[str, Fold]:
        folds: dict[str, Fold] = {}
        for path, delta in self._deltas.items():
            module = self.base.network.get_submodule(path)
            folds[f"{path}.weight"] = _transposed(delta.fold) if is_transposed(module) else delta.fold
            if module._parameters.get("bias") is not None:
                folds[f"{path}.bias"] = delta.fold_bias
        return folds

    def tensors(self) -> dict[str, Tensor]:
        return {f"{PREFIX}{path}.{k}": t for path, d in self._deltas.items() for k, t in d.tensors().items()}

    def peft_fields(self) -> dict[str, Any]:
        restarted = next(iter(restartable(self._deltas).values()), None)
        settings = self.config if restarted is None else restarted.now(self.config)
        return {
            **METHODS[self.config.method].to_peft(settings),
            "base_model_name_or_path": None,
            "target_modules": self._target_modules(),
            "exclude_modules": None,
            "layers_to_transform": None,
            "fan_in_fan_out": self._all_transposed(),
            "modules_to_save": None,
            "task_type": _task_type(self.base.network),
            "inference_mode": True,
        }

    def facts(self) -> dict[str, Any]:
        scales = {path: d.scale for path, d in self._deltas.items() if isinstance(getattr(d, "scale", None), float)}
        return {"method": self.config.method, "scales": scales, "roles": dict(METHODS[self.config.method].roles)}

    def _target_modules(self) -> str | list[str]:
        """What PEFT should read: a regular expression as given, else the shortest endings that name the same modules.

        PEFT fails on a matched module that is no layer, so the names must match the chosen layers and nothing else.
        """
        given, network, chosen = self.targeting.targets, self.base.network, list(self._deltas)
        if isinstance(given, str) and given != ALL_LINEAR and all_matching(network, given) == chosen:
            return given
        endings = sorted({p.rpartition(".")[2] for p in chosen})
        for names in (endings, chosen):
            if all_matching(network, names) == chosen:
                return names
        return "|".join(re.escape(path) for path in chosen)

    def _all_transposed(self) -> bool:
        modules = [self.base.network.get_submodule(p) for p in self._deltas]
        return all(is_transposed(m) and not isinstance(m, nn.Embedding) for m in modules)


def _task_type(network: nn.Module) -> str | None:
    """The class of PEFT's that AutoPeftModel should wrap the network in, for models that generate."""
    if not hasattr(network, "lm_head") or not hasattr(network, "prepare_inputs_for_generation"):
        return None
    return "SEQ_2_SEQ_LM" if getattr(getattr(network, "config", None), "is_encoder_decoder", False) else "CAUSAL_LM"


def _transposed(fold: Fold) -> Fold:
    return lambda w: fold(w.T).T


def _hook(delta: Delta) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], Tensor]:
    def change(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
        changed: Tensor = delta(inputs[0] if inputs else next(iter(named.values())), output)
        return changed

    return change


Inputs = tuple[tuple[Tensor, ...], dict[str, Tensor]]


def _before(delta: Delta) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], Inputs]:
    def change(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> Inputs:
        if inputs:
            return (delta.before(inputs[0]), *inputs[1:]), named
        name = next(iter(named))
        return (), {**named, name: delta.before(named[name])}

    return change
