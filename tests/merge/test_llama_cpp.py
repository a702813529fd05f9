"""A LoRA file of ours in llama.cpp itself: what it then finds likely is what the adapted model here does.

Skipped where xllamacpp, llama.cpp as a Python wheel, is not installed: `pip install xllamacpp` brings it.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.merge.test_gguf_adapter import trained
from tests.methods.layers import moved
from tests.methods.parity import fresh
from tests.models.conftest import write_gguf
from veneer.adapters.attach import attach
from veneer.base.load import load_model
from veneer.merge.export import as_lora
from veneer.merge.fold import merge
from veneer.merge.gguf_adapter import write_gguf_adapter
from veneer.merge.gguf_model import write_gguf_model
from veneer.methods.lora import LoRAConfig

TOKENS = [5, 77, 120, 9, 301, 42, 42, 260]
ASK = """
import json, sys
from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server

base, adapter, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
params = CommonParams()
params.model.path = base
params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 256, 1, 1, False
if adapter:
    params.lora_adapters = [CommonAdapterLoraInfo(adapter, 1.0)]
asked = {"prompt": tokens, "n_predict": 1, "n_probs": 386, "temperature": 0.0, "post_sampling_probs": False}
print("\\n" + json.dumps(Server(params).handle_completions(asked)))
"""


def theirs(base: Path, adapter: Path | str) -> dict[int, float]:
    """llama.cpp's log-probability of each next token; in a process of its own, which a crash may end."""
    command = [sys.executable, "-c", ASK, str(base), str(adapter), json.dumps(TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    choices = answer.get("completion_probabilities") or answer["choices"][0]["logprobs"]["content"]
    return {entry["id"]: entry["logprob"] for entry in choices[0]["top_logprobs"]}


@torch.no_grad()
def ours(model: Any) -> list[float]:
    """The same here, by token."""
    found: list[float] = model(torch.tensor([TOKENS])).logits[0, -1].double().log_softmax(-1).tolist()
    return found


IN_LLAMA_CPP = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs xllamacpp (llama.cpp as a wheel)")


@IN_LLAMA_CPP
@pytest.mark.parametrize("method", ["lora", "mora"])
def test_what_it_finds_likely_is_what_the_adapted_model_does(tiny_model: Path, tmp_path: Path, method: str) -> None:
    base, file, model = write_gguf(tiny_model, tmp_path / "base.gguf"), tmp_path / "adapter.gguf", fresh(tiny_model)
    settings = {"variant": "sharing"} if method == "mora" else {}
    plain = ours(model)
    adapter = trained(model, method, rank=2, **settings)
    changed = ours(model)
    write_gguf_adapter(as_lora(adapter).adapter, file)
    found, before = theirs(base, file), theirs(base, "")
    assert len(found) > 300
    error = max(abs(found[i] - changed[i]) for i in found)
    moved = max(abs(found[i] - before[i]) for i in found if i in before)
    assert max(abs(before[i] - plain[i]) for i in before) < 0.02
    assert error < 0.02 < 0.5 < moved, f"off by {error}, the adapter moves {moved}"


@IN_LLAMA_CPP
def test_a_merged_model_with_new_tokens_as_one_file(tiny_model: Path, tmp_path: Path) -> None:
    base = load_model(tiny_model, dtype="float32")
    adapter = attach(base, LoRAConfig(rank=2), new_tokens=["<sql>", "</sql>"]).eval()
    for number, delta in enumerate(adapter.deltas.values()):
        moved(delta, 0.3, seed=number)
    with torch.no_grad():
        for named in adapter.named():
            if named.place == "embedding":
                named.parameter.add_(torch.randn(named.parameter.shape, generator=torch.Generator().manual_seed(1)))
    want = ours(base.network)
    merge(adapter, tiny_model, tmp_path / "merged")
    write_gguf_model(tmp_path / "merged", tmp_path / "merged.gguf")
    found = theirs(tmp_path / "merged.gguf", "")
    assert {384, 385} <= found.keys() and max(abs(found[i] - want[i]) for i in found) < 0.02
