"""What a recipe asks of its model is held against config.json alone; which layers refuse what, in tests of methods."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from veneer.errors import ConfigError, ModelError, TargetError
from veneer.recipe.settings import Recipe
from veneer.train.compatibility import check_suited

Make = Callable[..., Recipe]
SMALL = {"vocab_size": 384, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}


@pytest.fixture
def bare(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model without its weights."""
    return Path(shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"method": {"name": "lora", "targets": ["q_prj"]}}, TargetError, "Did you mean 'q_proj'"),
        ({"method": {"name": "lora", "rank_pattern": {"x_proj": 2}}}, ConfigError, "fits no target"),
        ({"method": {"name": "lora", "init": "pissa", "rank": 17}}, ConfigError, r"lora.rank 17 is above 16"),
        ({"method": {"name": "ia3", "targets": ["embed_tokens"]}}, TargetError, "changes layers of kind conv, linear"),
    ],
)
def test_refused_without_weights(job: Make, bare: Path, changes: dict[str, Any], error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        check_suited(job(model=str(bare), **changes))


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "gpt2", "vocab_size": 384, "n_embd": 32, "n_head": 4, "n_layer": 1},
        {"model_type": "bloom", "vocab_size": 384, "hidden_size": 32, "n_head": 4, "n_layer": 1},  # notes nothing
        {"model_type": "mamba", "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1},  # has no attention
        {"model_type": "bert", **SMALL, "is_decoder": True},
        {"model_type": "bert", **SMALL},
        {"model_type": "roberta", **SMALL},
    ],
    ids=lambda a: a["model_type"] + " as a decoder" * a.get("is_decoder", False),
)
def test_an_encoder_lets_a_later_token_change_an_earlier_one(
    job: Make, bare: Path, architecture: dict[str, Any]
) -> None:
    (bare / "config.json").write_text(json.dumps(architecture))
    recipe, model = job(model=str(bare)), AutoModel.from_config(AutoConfig.from_pretrained(bare)).eval()
    first, second = (model(torch.tensor([[5, 6, 7, last]])).last_hidden_state for last in (8, 9))
    if torch.equal(first[:, :3], second[:, :3]):
        check_suited(recipe)
        return
    with pytest.raises(
        ModelError, match=r"method lora cannot be trained on .* is an encoder \(its attention sees later"
    ):
        check_suited(recipe)


def test_a_model_without_a_head(job: Make, bare: Path) -> None:
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    with pytest.raises(ModelError, match=r"LlamaModel is an encoder \(it has no output head\)"):
        check_suited(job(model=str(bare)))
