"""The Python API as a notebook uses it, against plain transformers and the command line's own pieces."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import veneer as vn
from tests.methods.layers import moved
from veneer.errors import ConfigError

QUESTION = "Which city?"


def changed(adapter: Any) -> Any:
    """The adapter with weights that matter."""
    for number, delta in enumerate(adapter.deltas.values()):
        moved(delta, 0.2, seed=number)
    return adapter.eval()


@pytest.fixture
def base(tiny_model: Path) -> Any:
    return vn.load_model(tiny_model, dtype="float32")


def by_transformers(folder: Path, base: Any, tokens: int) -> str:
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = [{"role": "user", "content": QUESTION}]
    ids = base.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return str(base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_generating_is_transformers_greedy_text(tiny_model: Path, base: Any) -> None:
    assert base.generate(QUESTION, max_tokens=12) == by_transformers(tiny_model, base, 12)
    assert base.generate([{"role": "user", "content": QUESTION}], max_tokens=12) == base.generate(
        QUESTION, max_tokens=12
    )
    shown: list[str] = []
    assert base.generate(QUESTION, max_tokens=12, show=shown.append) == "".join(shown)
    whole = base.generate("SELECT", max_tokens=8, format="raw")
    assert base.generate_many(["SELECT", "user"], max_tokens=8, format="raw")[0] == whole.strip()
    with pytest.raises(ConfigError, match="format is 'prose', should be one of chat, plain, raw"):
        base.generate(QUESTION, format="prose")


def test_an_adapter_is_attached_disabled_saved_and_used_by_name(base: Any, tmp_path: Path) -> None:
    alone = base.generate(QUESTION, max_tokens=8)
    adapter = changed(vn.attach(base, vn.LoRAConfig(rank=4, alpha=32)))
    trained = base.generate(QUESTION, max_tokens=8)
    assert trained != alone and base.attached == [adapter]
    with adapter.disabled():
        assert base.generate(QUESTION, max_tokens=8) == alone and base.attached == []
    adapter.save(tmp_path / "out")
    adapter.detach()
    named = vn.load_adapter(base, tmp_path / "out", name="sql")
    assert not named.attached and base.generate(QUESTION, max_tokens=8) == alone
    with base.using("sql") as chosen:
        assert chosen is named and base.generate(QUESTION, max_tokens=8) == trained
        with base.using(None):
            assert base.generate(QUESTION, max_tokens=8) == alone
        assert named.attached
    assert not named.attached
    with (
        pytest.raises(ConfigError, match=r"no adapter was loaded as 'sq1'\. Did you mean 'sql'\? Loaded: sql"),
        base.using("sq1"),
    ):
        pass


def test_merging_is_verified_on_built_in_texts(base: Any, tmp_path: Path) -> None:
    adapter = changed(vn.attach(base, vn.LoRAConfig(rank=4)))
    told: list[str] = []
    merged = adapter.merge(tmp_path / "merged", say=told.append)
    assert merged.drift.rows == 8 and merged.drift.relative_drift < 1e-5
    assert any("8 built-in texts" in text for text in told)
    assert by_transformers(tmp_path / "merged", base, 8) == base.generate(QUESTION, max_tokens=8)


def test_peft_spells_the_same_settings(base: Any) -> None:
    theirs = vn.LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.1, use_rslora=True, target_modules=("q_proj",))
    assert theirs == vn.LoRAConfig(rank=4, alpha=8, dropout=0.1, rank_stabilized=True, targets=("q_proj",))
    assert set(vn.attach(base, theirs).deltas) == {f"model.layers.{n}.self_attn.q_proj" for n in range(2)}
    with pytest.raises(ConfigError, match="LoRAConfig is given rank and r, which are one setting"):
        vn.LoRAConfig(rank=4, r=8)


def test_evaluating_rows_in_memory_and_from_a_file(base: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "a", "a": "b"}\n{"q": "c", "a": "d"}\n')
    found = vn.evaluate(base, rows, prompt="{q}", completion="{a}", max_new_tokens=4)
    assert list(found.metrics) == ["loss", "perplexity", "exact_match"] and found.rows == 2
    again = vn.evaluate(base, vn.read_rows(str(rows)), metrics=["loss"], prompt="{q}", completion="{a}", limit=2)
    assert again.metrics["loss"] == found.metrics["loss"]


def test_qlora_is_one_argument(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path))
    base = vn.load_model(tiny_model, storage="nf4", dtype="float32")
    assert str(base.storage) == "nf4 (block 64, double_quant True)"
    adapter = vn.attach(base, vn.LoRAConfig(rank=2))
    loss = base.network(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
