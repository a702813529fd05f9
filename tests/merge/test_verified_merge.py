"""A merge is verified: equal models pass, any other change is refused, whatever the rows and the dtypes are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer.merge.verified_merge as merged_module
from tests.methods.layers import moved
from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach
from veneer.base.base import Base
from veneer.base.load import load_model
from veneer.data.render import Renderer
from veneer.data.settings import DataSettings
from veneer.data.sources import Row
from veneer.disk.tensors import open_tensors
from veneer.errors import ConfigError, DataError, NotFoldable, Refused
from veneer.merge.verified_merge import beginnings, merge_and_verify
from veneer.merge.verify import logits_along
from veneer.methods.base import config_from

PROMPTS = [[5, 9, 300, 17], [1, 7], [250, 81, 3], [44]]


def adapted(base: Path, method: str = "lora", targets: Any = "all-linear") -> tuple[Base, Adapter]:
    loaded = load_model(base, dtype="float32")
    adapter = attach(loaded.network, config_from(method, {"rank": 2} if method == "lora" else {}), targets).eval()
    for n, delta in enumerate(adapter.deltas.values()):
        moved(delta, 0.2, seed=n)
    return loaded, adapter


Change = Callable[[Path, dict[str, torch.Tensor]], None]


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Change the tensors of the merged folder between writing and checking."""

    def install(change: Change) -> None:
        def merge(adapter: Adapter, base: Path, into: Path, **more: Any) -> int:
            size = true_merge(adapter, base, into, **more)
            tensors = load_file(into / "model.safetensors")
            change(base, tensors)
            save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
            return size

        true_merge = merged_module.merge
        monkeypatch.setattr(merged_module, "merge", merge)

    return install


def test_a_true_merge_passes_and_says_how_far_it_is(tiny_model: Path, tmp_path: Path) -> None:
    loaded, adapter = adapted(tiny_model)
    said: list[str] = []
    found = merge_and_verify(loaded, adapter, tmp_path / "merged", PROMPTS, say=said.append)
    assert found.folder == str(tmp_path / "merged")
    assert found.bytes == sum(f.stat().st_size for f in (tmp_path / "merged").iterdir())
    assert (found.drift.rows, found.drift.greedy_agreement, found.drift.near_ties) == (4, 1.0, 0)
    assert found.drift.relative_drift < 1e-5 and found.drift.max_drift < 1e-4
    assert [line.split()[0] for line in said] == ["writing", "folding", "comparing"]
    assert adapter.attached


@pytest.mark.parametrize(("dtype", "least", "most"), [("bfloat16", 1e-4, 0.05), ("float16", 1e-5, 0.02)])
def test_rounding_is_no_reason_to_refuse(
    tiny_model: Path, tmp_path: Path, dtype: str, least: float, most: float
) -> None:
    loaded, adapter = adapted(tiny_model)
    found = merge_and_verify(loaded, adapter, tmp_path / "merged", PROMPTS, dtype=getattr(torch, dtype))
    assert least < found.drift.relative_drift < most and found.drift.parted == 0


def unfolded(base: Path, tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = load_file(base / "model.safetensors")[name]


def slightly_off(base: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight"] *= 1.02


def not_a_number(base: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][3] = float("nan")


def silent(base: Path, tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] *= 0


@pytest.mark.parametrize("change", [unfolded, slightly_off, not_a_number, silent])
def test_a_changed_folder_is_refused_and_left_to_be_looked_at(
    tiny_model: Path, tmp_path: Path, change: Change, tampered: Callable[[Change], None]
) -> None:
    loaded, adapter = adapted(tiny_model)
    tampered(change)
    with pytest.raises(
        Refused, match=r"merged does not say what the unmerged one says: relative drift .*at most 0\.001"
    ):
        merge_and_verify(loaded, adapter, tmp_path / "merged", PROMPTS)
    assert Refused.exit_status == 3
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_text_that_parts_is_refused_however_small_the_drift(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, adapter = adapted(tiny_model)
    first: list[torch.Tensor] = []

    def along(*given: Any) -> list[torch.Tensor]:
        rows = [r.clone() for r in logits_along(*given)]
        if first:  # of the merged model: at one position, one word's logit falls
            rows[2][3, int(first[0].argmax())] -= 30
        first.append(rows[2][3])
        return rows

    monkeypatch.setattr(merged_module, "logits_along", along)
    monkeypatch.setattr(merged_module, "MOST_DRIFT", {torch.float32: 1.0})
    with pytest.raises(Refused, match="same greedy text on 75% of 4 rows, 0 near ties"):
        merge_and_verify(loaded, adapter, tmp_path / "merged", PROMPTS)


def test_an_adapter_that_is_not_on_the_model(tiny_model: Path, tmp_path: Path) -> None:
    loaded, adapter = adapted(tiny_model)
    adapter.detach()
    with pytest.raises(ConfigError, match=r"the adapter is not attached, .*attach it first"):
        merge_and_verify(loaded, adapter, tmp_path / "merged", PROMPTS)
    assert list(tmp_path.iterdir()) == []


def test_dropout_is_off_while_comparing(tiny_model: Path, tmp_path: Path) -> None:
    loaded = load_model(tiny_model, dtype="float32")
    adapter = attach(loaded.network, config_from("lora", {"rank": 2, "dropout": 0.5})).train()
    for n, delta in enumerate(adapter.deltas.values()):
        moved(delta, 0.2, seed=n)
    assert merge_and_verify(loaded, adapter, tmp_path / "merged", PROMPTS).drift.relative_drift < 1e-5


def test_no_rows_and_a_folder_that_is_taken_are_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, adapter = adapted(tiny_model)
    monkeypatch.setattr(merged_module, "generate", None)  # may not be called
    with pytest.raises(DataError, match="there are no rows to verify the merged model on"):
        merge_and_verify(loaded, adapter, tmp_path / "merged", [])
    with pytest.raises(ConfigError, match="exists already"):
        merge_and_verify(loaded, adapter, tmp_path, PROMPTS)
    with pytest.raises(ConfigError, match="is the base model itself"):
        merge_and_verify(loaded, adapter, tiny_model, PROMPTS)


def test_a_method_that_cannot_be_folded(tiny_model: Path, tmp_path: Path) -> None:
    loaded, adapter = adapted(tiny_model, "bottleneck", ("mlp",))
    with pytest.raises(
        NotFoldable, match=r"model\.layers\.0\.mlp: Bottleneck is not .*veneer generate MODEL --adapter"
    ):
        merge_and_verify(loaded, adapter, tmp_path / "merged", PROMPTS)
    assert list(tmp_path.iterdir()) == []


def test_of_prompts_too_long_the_end_is_read(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, adapter = adapted(tiny_model)
    asked: list[Any] = []
    monkeypatch.setattr(merged_module, "logits_along", lambda m, p, c: asked.append(p) or logits_along(m, p, c))
    long = [n % 384 for n in range(1000)]
    found = merge_and_verify(loaded, adapter, tmp_path / "merged", [long, [7]])
    assert found.drift.greedy_agreement == 1.0
    assert asked == [[long[-232:], [7]]] * 2, "256 positions, 24 of them for the answer"


def rows(*columns: dict[str, Any]) -> list[Row]:
    return [Row(c, "rows.jsonl", n) for n, c in enumerate(columns, start=1)]


def renderer(folder: Path, **settings: Any) -> Renderer:
    return Renderer(load_model(folder, dtype="float32").tokenizer, DataSettings(train="rows.jsonl", **settings), 32)


def test_beginnings_are_the_prompts(tiny_model: Path) -> None:
    reads = renderer(tiny_model, prompt="{q}", completion="{a}", format="plain")
    found = beginnings(rows({"q": "Which city?"}, {"q": "x", "a": None}), reads)
    assert [reads.tokenizer.decode(f) for f in found] == ["Which city?\n", "x\n"]


def test_beginnings_of_running_text_are_its_first_half(tiny_model: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    reads = renderer(tiny_model)
    (found,) = beginnings(rows({"text": text}), reads)
    whole = reads.tokenizer.encode(text)
    assert found == whole[: (len(whole) + 1) // 2] and 3 < len(found) < 32
    (part,) = beginnings(rows({"text": text * 9}), reads)
    assert len(part) == 16, "half of what fits one example"
    assert beginnings(rows({"text": text * 9}), renderer(tiny_model, too_long="drop")) == []


def test_a_row_that_cannot_be_read_is_named(tiny_model: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2: data\.prompt names the column 'q'"):
        beginnings(rows({"q": "x"}, {"question": "x"}), renderer(tiny_model, prompt="{q}", completion="{a}"))


@pytest.mark.model
def test_smollm2_in_its_own_dtypes(smollm2: Path, tmp_path: Path) -> None:
    loaded = load_model(smollm2, dtype="float32")
    adapter = attach(loaded.network, config_from("lora", {"rank": 4, "alpha": 4.0})).eval()
    for n, delta in enumerate(adapter.deltas.values()):
        moved(delta, 0.02, seed=n)
    texts = ["Which customers are in Berlin?\n", "The capital of France is", "def fibonacci(n):\n", "Dear Sir,\n"]
    prompts = [loaded.tokenizer.encode(text) for text in texts]
    found = merge_and_verify(loaded, adapter, tmp_path / "merged", prompts)
    dtypes = [{name: entry.dtype for name, entry in open_tensors(f).items()} for f in (smollm2, tmp_path / "merged")]
    assert dtypes[0] == dtypes[1] and torch.bfloat16 in dtypes[0].values()
    assert 1e-3 < found.drift.relative_drift < 0.03 and found.drift.parted == 0
