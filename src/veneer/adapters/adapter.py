"""An adapter: the ordered parts of one training (deltas, virtual tokens) on one base.

Training, evaluation, generation and merging use only this class; they do not ask which parts it has.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from veneer.adapters.part import NamedParameter, Part
from veneer.adapters.serialization import to_files
from veneer.base.base import Base
from veneer.disk.adapter_dir import AdapterFiles, write_adapter, write_parts
from veneer.methods.base import METHODS, Delta, MethodConfig


class Adapter:
    """A trained change of a base that can be attached and detached.

    Its parts hang on hooks and are no part of the network: `network.train()` and `.eval()` do not reach them, `train`
    and `eval` here do.
    """

    def __init__(self, base: Base, parts: Sequence[Part], base_name: str | None = None, name: str = "") -> None:
        self.base, self.parts = base, tuple(parts)
        self.base_name = base.name if base_name is None else base_name
        """The name by which others find the base; written into the adapter's folder."""
        self.name = name
        """What the caller calls it."""
        self.facts: dict[str, Any] = {}
        """What its folder says of its training: recipe, data, metrics."""
        self.new_tokens: tuple[str, ...] = ()
        """Tokens that it adds to the base's vocabulary."""
        self._frozen: list[nn.Parameter] = []

    @property
    def model(self) -> Any:
        """The base's network."""
        return self.base.network

    @property
    def kind(self) -> str:
        """The names of its method and prompt, for messages."""
        return " + ".join(part.kind for part in self.parts if part.kind)

    @property
    def attached(self) -> bool:
        """Whether it changes the network's outputs now."""
        return any(part.attached for part in self.parts)

    def attach(self) -> Self:
        """Attach every part and freeze the base; does nothing if attached."""
        if not self.attached:
            self._frozen = [p for p in self.model.parameters() if p.requires_grad]
            for parameter in self._frozen:
                parameter.requires_grad_(False)
            for part in self.parts:
                part.attach()
            self.base.attached.append(self)
        return self

    def detach(self) -> Self:
        """Detach every part and restore which parameters of the base are trained."""
        for part in reversed(self.parts):
            part.detach()
        if self in self.base.attached:
            self.base.attached.remove(self)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        return self

    @contextmanager
    def disabled(self) -> Iterator[Any]:
        """Inside, the network is the base alone."""
        was = self.attached
        self.detach()
        try:
            yield self.model
        finally:
            if was:
                self.attach()

    def holders(self) -> Mapping[str, nn.Module]:
        """The modules that hold the trained parameters and their buffers, by path."""
        return {path: holder for part in self.parts for path, holder in part.holders().items()}

    def named(self) -> list[NamedParameter]:
        """Every trained parameter, in a fixed order."""
        return [named for part in self.parts for named in part.named()]

    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter."""
        return [n.parameter for n in self.named()]

    def n_params(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())

    @property
    def deltas(self) -> Mapping[str, Delta]:
        """The method's deltas, by module path; empty where only a prompt is trained."""
        return {path: delta for part in self.parts for path, delta in part.deltas.items()}

    @property
    def settings(self) -> MethodConfig | None:
        """The method's settings; None where only a prompt is trained."""
        return next((part.settings for part in self.parts if part.settings is not None), None)

    def penalty(self) -> Tensor | None:
        """What the method adds to the loss of every step; None for nothing."""
        config = self.settings
        return None if config is None else METHODS[config.method].penalty(list(self.deltas.values()), config)

    def stepped_(self, step: int, steps: int) -> None:
        """Called after optimizer step `step` of `steps`, while the gradients are still there."""
        if (config := self.settings) is not None:
            METHODS[config.method].stepped_(list(self.deltas.values()), config, step, steps)

    def train(self, mode: bool = True) -> Self:
        """Turn dropout on or off."""
        for holder in self.holders().values():
            holder.train(mode)
        return self

    def eval(self) -> Self:
        """Turn dropout off."""
        return self.train(False)

    def files(self, facts: Mapping[str, Any] | None = None) -> dict[str, AdapterFiles]:
        """The content of the folders that `save` writes, by name."""
        return to_files(self.parts, self.base_name, self.new_tokens, facts or {})

    def save(self, folder: str | Path, facts: Mapping[str, Any] | None = None) -> int:
        """Write an adapter folder in PEFT's layout, with `facts` in veneer.json; returns its bytes.

        facts   by default the recipe, data and metrics of its training, where they are known

        Deltas and virtual tokens are two adapters to PEFT: the folder then holds `method/` and `prompt/`, and no
        adapter_config.json, so that nobody loads half of the adapter without knowing.
        """
        if facts is None:
            facts = {key: self.facts[key] for key in ("recipe", "data", "metrics") if key in self.facts}
        files = self.files(facts)
        if len(files) == 1:
            return write_adapter(Path(folder), next(iter(files.values())))
        base = next(iter(files.values())).facts["base"]
        return write_parts(Path(folder), files, {"base": base, **facts})
