"""A grown vocabulary: mean rows, tied weights still one, and the same base by its fingerprint."""

from pathlib import Path

import pytest
import torch

from tests.golden.toys import gpt2, inputs, outputs
from veneer.base.base import Base
from veneer.base.load import load_model
from veneer.base.vocabulary import add_tokens, grow_vocabulary_, mean_row, share_weight, token_ids, with_rows
from veneer.errors import ConfigError


@pytest.mark.parametrize("name", ["tiny_model", "tiny_untied"])
def test_rows_are_added_to_embedding_and_head(name: str, request: pytest.FixtureRequest) -> None:
    base = load_model(request.getfixturevalue(name), dtype="float32")
    before, old, print_ = share_weight(base), base.embedding.weight.detach().clone(), base.fingerprint  # type: ignore[union-attr, operator]
    tokens = torch.tensor([[5, 6, 7]])
    logits = base.network(tokens).logits
    grow_vocabulary_(base, 390)
    grow_vocabulary_(base, 388)
    assert base.embedding_rows == base.vocab_size == base.network.vocab_size == 390
    weight = base.embedding.get_parameter("weight")
    assert torch.equal(weight[:384], old) and torch.allclose(weight[384:], old.mean(0).expand(6, -1))
    assert share_weight(base) == before and not weight.requires_grad
    grown = base.network(tokens).logits
    assert grown.shape[-1] == 390 and torch.equal(grown[..., :384], logits)
    assert base.fingerprint == print_


def test_a_grown_base_with_other_weights_is_another(tiny_model: Path) -> None:
    base = load_model(tiny_model, dtype="float32")
    print_ = base.fingerprint
    grow_vocabulary_(base, 386)
    with torch.no_grad():
        base.embedding.get_parameter("weight")[0] += 1
    assert base.fingerprint != print_


def test_a_model_without_weights_and_gpt2_grow_too() -> None:
    base = Base.of(gpt2())
    want = outputs(base.network, inputs("gpt2"))
    rows = base.embedding_rows
    grow_vocabulary_(base, rows + 3)
    assert torch.equal(outputs(base.network, inputs("gpt2"))[..., :rows], want)
    empty = Base(gpt2().to("meta"))
    grow_vocabulary_(empty, rows + 3)
    assert empty.embedding.get_parameter("weight").shape[0] == rows + 3


def test_tokens_are_added_once(tiny_model: Path) -> None:
    tokenizer = load_model(tiny_model).tokenizer
    assert add_tokens(tokenizer, ["<a>", "<|im_end|>", "<b>"]) == [384, 2, 385]
    assert add_tokens(tokenizer, ["<b>", "<c>"]) == [385, 386] and len(tokenizer) == 387
    assert token_ids(tokenizer, ["<a>", 7]) == [384, 7]
    with pytest.raises(ConfigError, match="the tokenizer has no token '<d>'"):
        token_ids(tokenizer, ["<d>"])


def test_rows_keep_the_number_type() -> None:
    weight = torch.randn(4, 3, dtype=torch.bfloat16)
    assert with_rows(weight, 6).dtype == torch.bfloat16 and mean_row(weight, 2).dtype == torch.float32
    assert torch.equal(with_rows(weight, 6)[:4], weight)
