"""An adapter for the tiny model, random, so that it changes what is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def random_adapter(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Save a LoRA of rank 2 with random factors and return its folder: `random_adapter("sql", seed=1)`."""

    def make(name: str, seed: int = 0, model: Path = tiny_model, **facts: Any) -> Path:
        import torch
        from transformers import AutoModelForCausalLM

        from veneer.adapters.attach import attach
        from veneer.methods.base import config_from

        generator = torch.Generator().manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(model)
        adapter = attach(base, config_from("lora", {"rank": 2, "alpha": 8.0}), ("q_proj", "down_proj"), seed=seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        adapter.save(tmp_path / name, facts)
        return tmp_path / name

    return make
