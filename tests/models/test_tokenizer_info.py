"""Stop tokens and chat templates."""

from pathlib import Path
from types import SimpleNamespace

from transformers import AutoTokenizer

from veneer.models.tokenizer_info import eos_ids, has_chat_template, leading_ids


def test_the_tiny_tokenizer_stops_at_its_end_of_turn(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert has_chat_template(tokenizer)
    assert eos_ids(tokenizer) == {2}


def test_eos_of_tokenizer_config_and_template_are_all_stops(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = "<|endoftext|>"  # a base model's eos, while the template closes turns with <|im_end|>
    assert eos_ids(tokenizer) == {0, 2}
    assert eos_ids(tokenizer, SimpleNamespace(eos_token_id=7)) == {0, 2, 7}
    assert eos_ids(tokenizer, SimpleNamespace(eos_token_id=[7, 9])) == {0, 2, 7, 9}
    assert eos_ids(tokenizer, SimpleNamespace(eos_token_id=None)) == {0, 2}
    tokenizer.chat_template = None
    assert not has_chat_template(tokenizer)
    assert eos_ids(tokenizer) == {0}


def test_what_the_tokenizer_puts_in_front(tiny_model: Path) -> None:
    from tokenizers import processors

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert leading_ids(tokenizer) == []
    around = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=around
    )
    assert leading_ids(tokenizer) == [1]
