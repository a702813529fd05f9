"""When a text ends: at the model's end tokens, or before a given string."""

from collections.abc import Sequence

from veneer.base.base import Base
from veneer.models.tokenizer_info import eos_ids


def stop_ids(base: Base) -> set[int]:
    """Every token that ends an answer: the tokenizer's, the configs' and the chat template's."""
    configs = (base.network.config, getattr(base.network, "generation_config", None))
    return set().union(*(eos_ids(base.tokenizer, config) for config in configs if config is not None))


class StopStrings:
    """Cuts a growing text before the first of some strings, and holds back what may be the beginning of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = [s for s in strings if s]
        self.found = False
        self._held = ""

    def feed(self, text: str) -> str:
        """What of the text so far may be shown now; nothing more once `found`."""
        if self.found:
            return ""
        text = self._held + text
        starts = [at for s in self.strings if (at := text.find(s)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = max((n for s in self.strings for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, when the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held
