"""A conversation with one model and several adapters, of which one answers at a time."""

from collections.abc import Callable, Mapping

from veneer.base.base import Attachable, Base
from veneer.data.prompt_format import PlainText
from veneer.errors import ConfigError, did_you_mean
from veneer.generate.engine import Memory
from veneer.generate.sampler import Sampler, greedy
from veneer.generate.streaming import Answer, encode, speak

NONE = "none"
"""The word for no adapter."""


class ChatSession:
    """History, the adapter in force, and the keys and values that the next turn can use again.

    Adapters are handed over detached; `adapter` is the name of the one attached, if any. One with an entry in `forms`
    was trained on plain text: it is asked in that form, each question by itself.
    """

    def __init__(
        self,
        base: Base,
        adapters: Mapping[str, Attachable],
        *,
        forms: Mapping[str, PlainText] | None = None,
        sampler: Sampler = greedy,
        max_new_tokens: int = 512,
    ) -> None:
        self.base, self.adapters = base, dict(adapters)
        self.forms = dict(forms or {})
        self.sampler, self.max_new_tokens = sampler, max_new_tokens
        self.system: str | None = None
        self.adapter: str | None = None
        self.turns: list[dict[str, str]] = []
        self.memory = Memory()

    def ask(self, text: str, show: Callable[[str], object]) -> Answer:
        """Answer `text`.  Interrupted, the turn keeps what was shown; if it fails, it is forgotten."""
        shown: list[str] = []

        def put(piece: str) -> None:
            shown.append(piece)
            show(piece)

        self.turns.append({"role": "user", "content": text})
        try:
            form = self._form()
            asked = [{"role": "system", "content": self.system}] if self.system else []
            asked += self.turns if form is None else self.turns[-1:]
            tokens = encode(self.base.tokenizer, asked, plain=form)
            answer = speak(
                self.base,
                tokens,
                max_new_tokens=self.max_new_tokens,
                sampler=self.sampler,
                show=put,
                memory=self.memory,
            )
        except KeyboardInterrupt:
            self.turns.append({"role": "assistant", "content": "".join(shown)})
            raise
        except Exception:
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": answer.text})
        return answer

    def reset(self) -> None:
        """Forget all turns; the system message and the adapter stay."""
        self.turns.clear()

    def switch(self, name: str) -> str:
        """Attach the adapter `name` ("none" for none) in place of the one in force; says what is in force.

        The turns stay, what was computed for them does not, because an adapter changes it.
        Raises ConfigError for a name that is not there, with everything as it was.
        """
        if name != NONE and name not in self.adapters:
            known = [*self.adapters, NONE]
            raise ConfigError(f"there is no adapter {name!r}{did_you_mean(name, known)} There are: {', '.join(known)}.")
        if self.adapter is not None:
            self.adapters[self.adapter].detach()
        self.adapter = None if name == NONE else name
        if self.adapter is not None:
            self.adapters[self.adapter].attach()
        self.memory.clear()
        alone = ", trained on plain text: each question is answered by itself" if self._form() else ""
        return f"adapter {self.adapter or NONE}{alone}"

    def listing(self) -> str:
        """Every adapter, the one in force with a star."""
        return "\n".join(("* " if n == (self.adapter or NONE) else "  ") + n for n in [*self.adapters, NONE])

    def _form(self) -> PlainText | None:
        return self.forms.get(self.adapter or NONE)
