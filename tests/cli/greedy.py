"""What a model says by transformers' own greedy generation."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.adapters.attach import load_adapter


def said_after(folder: Path, text: str, new: int, adapter: Path | None = None) -> str:
    """At most `new` tokens that follow the text."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if adapter is not None:
        load_adapter(model, adapter)
    ids = torch.tensor([tokenizer.encode(text)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
