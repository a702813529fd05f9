"""What is traced on a few blocks, against what autograd keeps in all of them and what is really written."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.conftest import prepared
from tests.plan.checked import checked
from veneer.data.pack import Batch
from veneer.errors import ModelError
from veneer.plan import trace as module
from veneer.plan.trace import (
    FusedAttention,
    batch_bytes,
    evaluation_bytes,
    largest_batches,
    saved_copies,
    step_bytes,
    use_fused_attention_,
)
from veneer.recipe.settings import Recipe
from veneer.tasks.lm_loss import hidden_states
from veneer.train.activation_checkpointing import recomputing
from veneer.train.preflight import Checked
from veneer.train.run import train_recipe

Make = Callable[..., Recipe]


def batches(made: Checked) -> list[Batch]:
    return largest_batches(made, made.job.examples, made.job.steps, rounded=True)


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
    made = checked(wanted)
    batch = batches(made)[0]
    found = batch_bytes(made, batch, 2).kept
    assert found == pytest.approx(really_kept(wanted, batch), rel=0.05 if packing else 0.08)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("method", ["none", "lora"])
def test_prompts_keep_what_autograd_keeps(kind: str, method: str, recipe: Make) -> None:
    wanted = recipe(method={"name": method}, prompt={"name": kind, "tokens": 5})
    made = checked(wanted)
    batch = batches(made)[0]
    found = batch_bytes(made, batch, 2).kept
    assert found == pytest.approx(really_kept(wanted, batch), rel=0.08)


@pytest.mark.parametrize("changes", [{"data.packing": False}, {"prompt": {"name": "prompt"}}])
def test_recomputing_goes_with_documents_alone_and_prompts(changes: dict[str, Any], recipe: Make) -> None:
    batch = batches(checked(recipe(**changes)))[0]
    kept, again = (batch_bytes(checked(recipe(**changes, **{"train.recompute": r})), batch, 4) for r in (False, True))
    assert again.kept < kept.kept and again.block > kept.block


def test_recomputed_blocks_keep_less_and_compute_with_more(
    recipe: Make, made_model: Callable[..., Path], tmp_path: Path
) -> None:
    deep = str(made_model(tmp_path / "deep", num_hidden_layers=4))
    made = [checked(recipe(model=deep, **{"train.recompute": n})) for n in (False, 1, 3, True)]
    batch = batches(made[0])[0]
    kept = [batch_bytes(m, batch, 4) for m in made]
    assert [s.kept for s in kept] == sorted({s.kept for s in kept}, reverse=True)
    assert kept[0].kept - kept[1].kept == pytest.approx((kept[1].kept - kept[2].kept) / 2, rel=0.1)
    assert kept[3].block > kept[0].block


def test_paged_inputs_leave_memory_but_for_those_in_flight(recipe: Make) -> None:
    batch = batches(checked(recipe()))[0]
    again, paged = (
        batch_bytes(checked(recipe(**{"train.recompute": True, "memory.page_activations": p})), batch, 10)
        for p in (False, True)
    )
    assert again.kept - paged.kept == paged.paged * 6 // 10


def test_the_largest_micro_batch_is_taken(recipe: Make) -> None:
    made = checked(recipe())
    most = max(sum(len(made.job.examples[i]) for i in m) for step in made.job.steps for m in step)
    found = max(b.input_ids.shape[1] for b in batches(made))
    assert most <= found < most + 64 and len(step_bytes(made)) == len(batches(made))


def test_two_chunks_of_the_head_take_what_all_of_them_take(recipe: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr("veneer.tasks.lm_loss.CHUNK_BYTES", 0)  # 16 rows each
    made = checked(recipe())
    few = batches(made)[0]
    n = few.input_ids.shape[1]
    assert n > 3 * 16
    batch = replace(few, supervised=torch.arange(n), targets=torch.arange(n))
    two = batch_bytes(made, batch, 2).head
    monkeypatch.setattr(module, "chunk_rows", lambda base: len(batch.targets))
    assert batch_bytes(made, batch, 2).head == two


def test_an_architecture_that_needs_numbers_is_a_model_that_cannot_be_sized(recipe: Make, monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("needs numbers\nand more")

    monkeypatch.setattr(module, "hidden_states", broken)
    with pytest.raises(ModelError, match=r"cannot be estimated \(RuntimeError: needs numbers\)$"):
        step_bytes(checked(recipe()))


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
    made = checked(wanted)
    batch = batches(made)[0]
    found = batch_bytes(made, batch, 5).kept
    assert found == pytest.approx(really_kept(wanted, batch), rel=0.12, abs=20_000)


def with_held_out(recipe: Make, words: int, **changes: Any) -> Recipe:
    data = recipe().data.model_dump()
    file = Path(recipe().run).parent / "held-out.jsonl"
    file.write_text(json.dumps({"prompt": "order " * words, "completion": "name"}) + "\n")
    return recipe(data={**data, "eval": str(file)}, **{"train.max_length": 256, **changes})


@pytest.mark.parametrize("change", [{}, {"prompt": {"name": "prefix", "tokens": 5}}, {"data.packing": False}])
def test_evaluation_keeps_nothing_for_a_backward_pass(
    recipe: Make, change: dict[str, Any], made_model: Callable[..., Path], tmp_path: Path
) -> None:
    deep = str(made_model(tmp_path / "deep", num_hidden_layers=10))
    two, ten = (
        evaluation_bytes(checked(with_held_out(recipe, 50, model=m, **change)))[0] for m in (recipe().model, deep)
    )
    assert two == ten and two.forward > 0 and two.head > 0 == two.block
    assert evaluation_bytes(checked(recipe())) == []


@pytest.mark.parametrize(
    ("method", "restarts", "copies"),
    [
        ({"name": "lora", "rank": 2}, 0, 0),
        ({"name": "mora", "rank": 2}, 0, 1),  # both of LoRA's names hold M
        ({"name": "lora", "rank": 2}, 3, 4),  # all cycles are one LoRA of a higher rank
    ],
)
def test_tensors_that_are_computed_to_be_written(
    recipe: Make, method: dict[str, Any], restarts: int, copies: int
) -> None:
    again = {"restarts": {"every": 1}, "train.warmup": 0} if restarts else {}
    made = checked(recipe(method=method, **again, **{"train.steps": restarts + 1}))
    assert saved_copies(made) == copies * 4 * made.adapter.n_params()


@pytest.mark.parametrize(("steps", "squares"), [(2, 0), (3, 1), (4, 1)])
def test_groupings_that_come_again_are_added_to_be_written(steps: int, squares: int, recipe: Make) -> None:
    method = {"name": "mora", "rank": 2, "variant": "sharing", "groupings": 2}
    made = recipe(method=method, restarts={"every": 1}, **{"train.warmup": 0, "train.steps": steps})
    _, job = train_recipe(made)
    assert job is not None
    deltas = job.adapter.deltas.values()
    there = {t.data_ptr() for d in deltas for t in [*d.parameters(), *d.past.values()]}
    written = [t for d in deltas for t in d.tensors().values() if t.data_ptr() not in there]
    assert saved_copies(checked(made)) == sum(t.nbytes for t in written) == squares * 4 * job.adapter.n_params()


def test_a_prompt_is_written_as_it_is(recipe: Make) -> None:
    assert saved_copies(checked(recipe(prompt={"name": "prompt", "tokens": 5}, method={"name": "none"}))) == 0


def saved_by_attention(device: str) -> tuple[int, torch.Size]:
    q, k, v = (torch.empty(1, 4, 32, 16, device=device, requires_grad=True) for _ in range(3))
    sizes: list[int] = []

    def pack(t: torch.Tensor) -> Any:
        sizes.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), FusedAttention():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.sum().backward()  # type: ignore[no-untyped-call]
    assert q.grad is not None and q.grad.shape == q.shape
    return sum(sizes), out.shape


def test_attention_saves_what_the_fused_kernel_saves() -> None:
    assert saved_by_attention("meta") == saved_by_attention("cpu")


def test_a_block_that_is_recomputed_in_the_backward_pass_attends_fused_too() -> None:
    names: list[str] = []

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = F.scaled_dot_product_attention(x, x, x, is_causal=True)
            names.append(type(out.grad_fn).__name__)
            return out.sin()

    block = Block()
    use_fused_attention_(block)
    x = torch.empty(1, 4, 32, 16, device="meta", requires_grad=True)
    out: torch.Tensor = checkpoint(block, x, use_reentrant=False)
    out.backward(torch.empty_like(out))
    assert names == ["_FusedBackward"] * 2
