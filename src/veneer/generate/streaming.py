"""One answer at a time, shown as it comes: what a terminal's `generate` and `chat` are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.base.base import Base
from veneer.data.prompt_format import PlainText
from veneer.errors import ConfigError, ModelError
from veneer.generate.detokenizer import StreamDecoder
from veneer.generate.engine import Memory, generate
from veneer.generate.sampler import Sampler, Sampling, greedy
from veneer.generate.stop import StopStrings
from veneer.models.tokenizer_info import has_chat_template, leading_ids


@dataclass(frozen=True)
class Answer:
    """What was written."""

    text: str
    tokens: int
    stopped: bool
    """Whether it came to its own end, rather than to max_new_tokens."""


def sampler_of(temperature: float, top_p: float = 1.0, top_k: int = 0, seed: int = 0) -> Sampler:
    """Greedy at temperature 0, else by chance.  Raises ConfigError for settings out of range or without effect."""
    if temperature == 0:
        if top_p != 1 or top_k:
            raise ConfigError("top_p and top_k choose among drawn tokens; give a temperature above 0 with them")
        return greedy
    return Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)


def encode(tokenizer: Any, messages: Sequence[dict[str, str]], *, plain: PlainText | None = None) -> list[int]:
    """Token ids of a conversation up to where the model speaks.

    plain    put the one message as plain text, after the tokens that the tokenizer puts in front of a text
    Raises ModelError for a tokenizer without chat template, ConfigError for a system message in plain text.
    """
    if plain is not None:
        if len(messages) > 1:
            raise ConfigError("plain text has no system message and no turns; write everything into the prompt")
        ids = tokenizer(plain.text(messages[0]["content"]), add_special_tokens=False)["input_ids"]
        return [*leading_ids(tokenizer), *map(int, ids)]
    if not has_chat_template(tokenizer):
        raise ModelError(
            'the model\'s tokenizer has no chat template, so it has no turns; give format="raw" to continue a text'
        )
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return [int(t) for t in tokenizer(text, add_special_tokens=False)["input_ids"]]


def speak(
    base: Base,
    tokens: Sequence[int],
    *,
    max_new_tokens: int,
    sampler: Sampler = greedy,
    show: Callable[[str], object],
    stop: Sequence[str] = (),
    memory: Memory | None = None,
) -> Answer:
    """Generate after `tokens` and hand each piece of text to `show` as soon as it is certain.

    stop     texts before which the answer ends
    memory   as for `generate`
    """
    decoder, stopper = StreamDecoder(base.tokenizer), StopStrings(stop)
    pieces: list[str] = []

    def put(piece: str) -> None:
        if piece:
            pieces.append(piece)
            show(piece)

    def on_token(row: int, token: int) -> bool:
        put(stopper.feed(decoder.feed(token)))
        return stopper.found

    written = generate(
        base, [tokens], max_new_tokens=max_new_tokens, sampler=sampler, on_token=on_token, memory=memory
    )[0]
    put(stopper.feed(decoder.rest()))
    put(stopper.rest())
    return Answer("".join(pieces), len(written), stopper.found or len(written) < max_new_tokens)
