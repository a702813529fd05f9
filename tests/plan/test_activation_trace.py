"""What a step keeps, foreseen from a few blocks, against what autograd really keeps in all of them."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import prepared
from veneer.data.pack import Batch
from veneer.errors import ModelError
from veneer.plan import activation_trace as module
from veneer.plan.activation_trace import largest_batches, step_bytes
from veneer.plan.meta_model import Plain
from veneer.recipe.settings import Recipe
from veneer.tasks.lm_loss import hidden_states
from veneer.train.activation_checkpointing import recomputing
from veneer.train.job import Job, order_of_steps, read_job

Make = Callable[..., Recipe]


def batches(recipe: Recipe) -> list[Batch]:
    rows = read_job(recipe)
    order = order_of_steps([len(e) for e in rows.examples], recipe.train, packing=recipe.data.packing)
    return largest_batches(recipe, rows.examples, order)


class Saved:
    """A tensor, for as long as the graph holds it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def really_kept(recipe: Recipe, batch: Batch) -> int:
    """Bytes of distinct storages that the graph holds beside weights, and of the result."""
    job = prepared(recipe)
    frozen = [*job.base.network.parameters(), *job.base.network.buffers(), *job.adapter.parameters()]
    seen = {t.untyped_storage().data_ptr() for t in frozen}
    graph: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(t: torch.Tensor) -> Saved:
        graph.add(saved := Saved(t))
        return saved

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor),
        recomputing(job.base, recipe.train.recompute),
    ):
        out = hidden_states(job.base, batch, packed=recipe.data.packing)
    kept = {s.tensor.untyped_storage().data_ptr(): s.tensor.untyped_storage() for s in graph}
    kept = {place: storage for place, storage in kept.items() if place not in seen}
    given = {t.untyped_storage().data_ptr() for t in (batch.supervised, batch.input_ids, batch.position_ids)}
    return sum(s.nbytes() for key, s in kept.items() if key not in given) + out.nbytes


@pytest.mark.parametrize("method", [{"name": n} for n in ("lora", "dora", "mora")] + [{"init": "eva"}], ids=str)
@pytest.mark.parametrize("packing", [True, False])
def test_kept_bytes_are_those_of_autograd(method: dict[str, str], packing: bool, recipe: Make) -> None:
    wanted = recipe(**{"method": {**method, "rank": 2}, "data.packing": packing})
    batch = batches(wanted)[0]
    found = step_bytes(Plain.of(wanted), batch, 2).kept
    assert found == pytest.approx(really_kept(wanted, batch), rel=0.05 if packing else 0.08)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("method", ["none", "lora"])
def test_prompts_keep_what_autograd_keeps(kind: str, method: str, recipe: Make) -> None:
    wanted = recipe(method={"name": method}, prompt={"name": kind, "tokens": 5})
    batch = batches(wanted)[0]
    found = step_bytes(Plain.of(wanted), batch, 2).kept
    assert found == pytest.approx(really_kept(wanted, batch), rel=0.08)


@pytest.mark.parametrize("changes", [{"data.packing": False}, {"prompt": {"name": "prompt"}}])
def test_recomputing_goes_with_documents_alone_and_prompts(changes: dict[str, Any], recipe: Make) -> None:
    batch = batches(recipe(**changes))[0]
    kept, again = (step_bytes(Plain.of(recipe(**changes, **{"train.recompute": r})), batch, 4) for r in (False, True))
    assert again.kept < kept.kept and again.block > kept.block


def test_recomputed_blocks_keep_less_and_compute_with_more(recipe: Make) -> None:
    batch = batches(recipe())[0]
    kept = [step_bytes(Plain.of(recipe(**{"train.recompute": n})), batch, 4) for n in (False, 1, 3, True)]
    assert [s.kept for s in kept] == sorted({s.kept for s in kept}, reverse=True)
    assert kept[0].kept - kept[1].kept == pytest.approx((kept[1].kept - kept[2].kept) / 2, rel=0.1)
    assert kept[3].block > kept[0].block


def test_paged_inputs_leave_memory_but_for_those_in_flight(recipe: Make) -> None:
    batch = batches(recipe())[0]
    again, paged = (
        step_bytes(Plain.of(recipe(**{"train.recompute": True, "memory.page_activations": p})), batch, 10)
        for p in (False, True)
    )
    assert again.kept - paged.kept == paged.paged * 6 // 10


def test_the_largest_micro_batch_is_taken(recipe: Make) -> None:
    wanted = recipe()
    rows: Job = read_job(wanted)
    order = order_of_steps([len(e) for e in rows.examples], wanted.train, packing=True)
    most = max(sum(len(rows.examples[i]) for i in m) for step in order for m in step)
    found = max(b.input_ids.shape[1] for b in largest_batches(wanted, rows.examples, order))
    assert most <= found < most + 64


def test_two_chunks_of_the_head_take_what_all_of_them_take(recipe: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr("veneer.tasks.lm_loss.CHUNK_BYTES", 0)  # 16 rows each
    few = batches(recipe())[0]
    n = few.input_ids.shape[1]
    assert n > 3 * 16
    batch = replace(few, supervised=torch.arange(n), targets=torch.arange(n))
    two = step_bytes(Plain.of(recipe()), batch, 2).head
    monkeypatch.setattr(module, "chunk_rows", lambda vocab_size: len(batch.targets))
    assert step_bytes(Plain.of(recipe()), batch, 2).head == two


def test_an_architecture_that_needs_numbers_is_a_model_that_cannot_be_sized(recipe: Make, monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("needs numbers\nand more")

    monkeypatch.setattr(module, "hidden_states", broken)
    with pytest.raises(ModelError, match=r"cannot be foreseen \(RuntimeError: needs numbers\)$"):
        step_bytes(Plain.of(recipe()), batches(recipe())[0], 2)


@pytest.mark.parametrize("again", [False, True, 2, [3]])
@pytest.mark.parametrize(
    "method",
    [
        {"layers": [3]},
        {"layers": [1, 3]},
        {"targets": r"model\.layers\.2\..*", "rank": 8},
        {"targets": ["lm_head"]},
        {"targets": ["embed_tokens", "3.mlp.up_proj"]},
    ],
    ids=str,
)
def test_blocks_before_the_first_that_is_changed_keep_nothing(
    method: dict[str, Any], again: Any, recipe: Make, made_model: Callable[..., Any], tmp_path: Any
) -> None:
    deep = made_model(tmp_path / "deep", num_hidden_layers=5)
    wanted = recipe(model=str(deep), method={"name": "lora", **method}, **{"train.recompute": again})
    batch = batches(wanted)[0]
    found = step_bytes(Plain.of(wanted), batch, 5).kept
    assert found == pytest.approx(really_kept(wanted, batch), rel=0.12, abs=20_000)
