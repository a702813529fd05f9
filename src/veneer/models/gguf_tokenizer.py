"""Write the tokenizer of a GGUF file as a Hugging Face tokenizer with its chat template.

Byte-level BPE is built from the vocabulary, merges and token types in the file. The file only names the rule that
splits text before merging (tokenizer.ggml.pre); the rules are below, by name (llama.cpp, src/llama-vocab.cpp).
Other kinds (SentencePiece, unigram) go through transformers' own reader.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer.disk.atomic import write_json
from veneer.errors import ModelError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {"llama3": LLAMA3, "llama-v3": LLAMA3, "llama-bpe": LLAMA3, "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2}
GPT2 = {"gpt-2", "gpt2", "default"}
DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""Split off every digit, then apply GPT-2's rule."""
CONTROL, USER_DEFINED = 3, 4


def write_tokenizer(file: Path, reader: Any, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template into `folder`.

    Raises ModelError for a tokenizer that cannot be rebuilt.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    facts = {key.removeprefix("tokenizer.ggml."): key for key in reader.fields if key.startswith("tokenizer.ggml.")}
    facts = {key: reader.fields[long].contents() for key, long in facts.items()}
    pre = facts.get("pre", "default")
    if facts.get("model") != "gpt2" or pre not in SPLITS.keys() | GPT2 | DIGITS:
        try:
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        except (ValueError, KeyError, ImportError, OSError) as error:
            raise ModelError(
                f"{file}: its tokenizer {facts.get('model')!r} ({pre!r}) cannot be rebuilt: {error}"
            ) from error
        return
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    specials = {
        f"{ours}_token": facts["tokens"][facts[f"{theirs}_token_id"]]
        for ours, theirs in named.items()
        if f"{theirs}_token_id" in facts
    }
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(tokenizer_object=_byte_level(facts, pre, specials), clean_up_tokenization_spaces=False, **specials)
    architecture = reader.fields["general.architecture"].contents()
    if (length := reader.fields.get(f"{architecture}.context_length")) is not None:
        tokenizer.model_max_length = length.contents()
    if (template := reader.fields.get("tokenizer.chat_template")) is not None:
        tokenizer.chat_template = template.contents()
    tokenizer.save_pretrained(folder)
    about = folder / "tokenizer_config.json"  # transformers 5 writes a class that 4 does not know; both load this one
    write_json(about, json.loads(about.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def rule_of(backend: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of the rule by which a tokenizer (its tokenizer.json) splits text; None if it is not known."""
    model = backend["model"]
    rule = _split_of(backend) if model["type"] == "BPE" and not model.get("byte_fallback") else None
    normalizer = backend.get("normalizer")
    composed = rule == "qwen2" and normalizer == {"type": "NFC"}  # llama.cpp leaves it out
    return rule if normalizer is None or composed else None


def _split_of(backend: Mapping[str, Any]) -> str | None:
    split = backend["pre_tokenizer"] or {}
    steps = split["pretokenizers"] if split.get("type") == "Sequence" else [split]
    *first, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if not first:
        return "gpt-2" if last["use_regex"] else None
    if len(first) > 1:
        return None
    if first[0]["type"] == "Digits" and first[0]["individual_digits"] and last["use_regex"]:
        return "smollm"
    rules = {LLAMA3: "llama-bpe", QWEN2: "qwen2"}
    whole = first[0]["type"] == "Split" and not last["use_regex"] and not first[0]["invert"]
    return rules.get(first[0]["pattern"].get("Regex")) if whole and first[0]["behavior"] == "Isolated" else None


def _byte_level(facts: dict[str, Any], pre: str, specials: dict[str, str]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    merges = [tuple(merge.split(" ")) for merge in facts["merges"]]
    vocabulary = {token: index for index, token in enumerate(facts["tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=SPLITS.get(pre) is LLAMA3))
    if pre in SPLITS:
        first: list[Any] = [pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")]
    else:
        first = [pre_tokenizers.Digits(individual_digits=True)] if pre in DIGITS else []
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SPLITS)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, rest])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(facts["tokens"], facts.get("token_type") or [], strict=False))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in kinds if k == CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k == USER_DEFINED])
    if facts.get("add_bos_token") and "bos_token" in specials:
        bos = specials["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, vocabulary[bos])]
        )
    return tokenizer
