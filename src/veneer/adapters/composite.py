"""A method's deltas and a prompt, trained as one, as the LoRA paper's section E.1 combines them (arXiv:2106.09685).

On disk each part is an adapter folder of its own, which PEFT loads by itself: `method/` and `prompt/`. There is no
adapter_config.json beside them, so that nobody loads half of what was trained without knowing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from veneer.adapters.adapter import Change, Named
from veneer.adapters.virtual_tokens import Prompted
from veneer.disk.adapter_dir import write_parts
from veneer.methods.base import Delta, MethodConfig

if TYPE_CHECKING:
    from veneer.adapters.attach import Adapter

METHOD, PROMPT = "method", "prompt"


class Together(Change):
    """An adapter and a prompt on one model; `method` and `prompt` are the parts."""

    def __init__(self, method: "Adapter", prompt: Prompted) -> None:
        self.method, self.prompt = method, prompt
        self.model, self.base = method.model, method.base

    @property
    def kind(self) -> str:
        return f"{self.method.kind} + {self.prompt.kind}"

    @property
    def attached(self) -> bool:
        return self.method.attached or self.prompt.attached

    def attach(self) -> "Together":
        self.method.attach()
        self.prompt.attach()
        return self

    def detach(self) -> "Together":
        self.prompt.detach()
        self.method.detach()
        return self

    def holders(self) -> Mapping[str, nn.Module]:
        return {**self.method.holders(), **self.prompt.holders()}

    def named(self) -> list[Named]:
        return [*self.method.named(), *self.prompt.named()]

    @property
    def deltas(self) -> Mapping[str, Delta]:
        return self.method.deltas

    @property
    def settings(self) -> MethodConfig:
        return self.method.settings

    def penalty(self) -> Tensor | None:
        return self.method.penalty()

    def stepped_(self, step: int, steps: int) -> None:
        self.method.stepped_(step, steps)

    def save(self, folder: str | Path, facts: Mapping[str, Any] | None = None) -> int:
        files = {METHOD: self.method.files(facts), PROMPT: self.prompt.files(facts)}
        return write_parts(Path(folder), files, {"base": files[METHOD].facts["base"], **(facts or {})})
