"""What the tests of all rooms share: a tiny made model with a real tokenizer, and the real SmolLM2 for `model` tests.

Tests reach no hub: huggingface_hub is set offline for the test process before anything imports it.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "Which city has the largest number of customers?",
    "SELECT name, count(*) FROM customers GROUP BY name ORDER BY count(*) DESC LIMIT 1",
    "user assistant system: the quick brown fox jumps over the lazy dog, twice a day.",
    "How many employees were hired after 2019-03-01? SELECT count(*) FROM employees WHERE hired > '2019-03-01'",
] * 8


def make_tokenizer(folder: Path, vocabulary: int = 384) -> None:
    """Write a byte-level BPE tokenizer with a ChatML template.

    0 <|endoftext|>, 1 <|im_start|> (bos), 2 <|im_end|> (eos and pad).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    assert bpe.get_vocab_size() == vocabulary
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def make_model(folder: Path, *, tied: bool = True, vocabulary: int = 384, seed: int = 0, **changes: object) -> Path:
    """Write a random LlamaForCausalLM (2 layers, hidden 32, 4 heads, 2 KV heads, float32) with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, object] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.2,  # wide enough that logits differ visibly between tokens
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(shape | changes)))
    model.save_pretrained(folder)
    make_tokenizer(folder, vocabulary)
    return folder


def tiny_recipe(model: Path, rows: Path, run: Path, /, **changes: Any) -> Any:
    """A recipe of two micro-batches a step over few rows; `changes` by dotted name outrank, a section as a whole."""
    from veneer.recipe.load import recipe_from

    portions = {"tokens_per_step": 256, "micro_batch_tokens": 128, "max_length": 128, "dtype": "float32"}
    tree: dict[str, Any] = {
        "model": str(model),
        "run": str(run),
        "data": {"train": str(rows)},
        "method": {"name": "lora", "rank": 4},
        "optimizer": {"lr": 0.01},
        "train": portions,
    }
    for dotted, value in changes.items():
        section, _, key = dotted.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[key] = value
    return recipe_from(tree)


MISSING = ("needs ", "could not import ")
"""How the reason of a skip begins where a package, a compiler or a program is missing."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """On CI, end with the tests that a missing package left out: there everything should be installed."""
    skipped = terminalreporter.getreports("skipped") if os.environ.get("CI") == "true" else []
    reasons = [(r.longrepr[2].removeprefix("Skipped: "), r.nodeid) for r in skipped if isinstance(r.longrepr, tuple)]
    missing = [(reason, test) for reason, test in reasons if reason.startswith(MISSING)]
    if missing:
        terminalreporter.section("NOT TESTED: something is not installed", sep="!", red=True, bold=True)
        for reason, n in Counter(reason for reason, _ in missing).items():
            terminalreporter.line(f"{n} skipped: {reason}", red=True)
            for test in [t for other, t in missing if other == reason]:
                terminalreporter.line(f"    {test}")


def copy_headers(model: Path, folder: Path) -> Path:
    """Copy a model folder whose weights file has its header and zeros in the place of every weight."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: 8 + int.from_bytes(whole[:8], "little")])
    os.truncate(file, len(whole))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 2-layer LLaMA of 384 words, tied embeddings, float32; read-only by agreement."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an output head of its own."""
    return make_model(tmp_path_factory.mktemp("models") / "tiny-untied", tied=False, seed=1)


@pytest.fixture(scope="session")
def made_model() -> Callable[..., Path]:
    """`make_model`, for a test that needs another shape: `made_model(folder, hidden_size=64)`."""
    return make_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real SmolLM2-135M-Instruct, from veneer's cache; for tests marked `model` only."""
    from veneer.models.sources import resolve

    return resolve("smollm2-135m-instruct")


def prepared(recipe: Any, say: Callable[[str], None] = lambda _: None) -> Any:
    """A `Training` of the recipe: its rows, its base and its adapter, as `veneer train` would set them up."""
    from veneer.train.job import read_job
    from veneer.train.preflight import preflight
    from veneer.train.setup import set_up

    return set_up(preflight(read_job(recipe, say)), say=say)


def mean_loss(network: Any, examples: Any, recipe: Any) -> float:
    """The held-out loss of a network, in nats a supervised position, as a run of the recipe measures it."""
    from veneer.base.base import Base
    from veneer.tasks.causal_lm import CausalLM
    from veneer.train.job import held_out_settings

    return CausalLM().held_out_loss(Base(network), examples, **held_out_settings(recipe)).mean
