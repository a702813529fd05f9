"""Whether an adapter means the same here and in peft: saved here it loads there, and the reverse."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.methods.layers import moved
from veneer.adapters.attach import attach, load_adapter
from veneer.methods.base import MethodConfig

TOKENS = torch.tensor([[5, 9, 300, 17, 2, 81, 33], [1, 7, 7, 250, 100, 12, 383]])


def fresh(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model(TOKENS).logits
    return out


def peft_loads(base: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft meets deprecations of transformers
        return peft.PeftModel.from_pretrained(fresh(base), str(adapter)).eval()


def drift_there(base: Path, config: MethodConfig, targets: Any, folder: Path, spread: float = 0.2) -> float:
    """Largest difference of logits after an adapter saved here was loaded in peft."""
    model = fresh(base)
    plain = logits(model)
    adapter = attach(model, config, targets).eval()
    for n, delta in enumerate(adapter.deltas.values()):
        moved(delta, spread, seed=n)
    here = logits(model)
    assert float((here - plain).abs().max()) > 0.1, "the adapter changes too little for a comparison"
    adapter.save(folder)
    return float((logits(peft_loads(base, folder)) - here).abs().max())


def drift_here(base: Path, config: peft.PeftConfig, folder: Path, spread: float = 0.2) -> float:
    """Largest difference of logits after an adapter saved in peft was loaded here."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft meets deprecations of transformers
        torch.manual_seed(3)
        theirs = peft.get_peft_model(fresh(base), config).eval()
        with torch.no_grad():
            for _, parameter in theirs.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * spread)
        there = logits(theirs)
        theirs.save_pretrained(str(folder))
    model = fresh(base)
    assert float((there - logits(model)).abs().max()) > 0.1, "the adapter changes too little for a comparison"
    load_adapter(model, folder)
    return float((logits(model) - there).abs().max())
