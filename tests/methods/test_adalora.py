"""AdaLoRA against its paper's equations, and its schedule against peft's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import load_file, save_file
from torch import nn

from tests.methods.layers import (
    delta_on,
    folded,
    gradients_hold,
    layer_of,
    learns_in_two_steps,
    linear,
    moved,
    rows,
    through,
)
from tests.methods.parity import drift_here, drift_there, fresh, logits, peft_loads
from tests.oracles import adalora as oracle
from veneer.adapters.attach import load_adapter
from veneer.errors import AdapterMismatch, ConfigError
from veneer.methods.adalora import (
    AdaLoRA,
    AdaLoRAConfig,
    budget,
    choose,
    orthogonality,
    sensitivity,
    triplet_scores,
)
from veneer.recipe.load import recipe_from
from veneer.train.run import train_recipe

CONFIG = AdaLoRAConfig(rank=4, target_rank=2, alpha=6)


def double(t: torch.Tensor) -> Any:
    return t.detach().numpy().astype(float)


def test_forward_and_fold_are_the_papers_sum() -> None:
    module, x = linear(9, 6), rows(2, 3, 9)
    delta = moved(delta_on(module, CONFIG))
    want = oracle.weight(double(module.weight), double(delta.a), double(delta.e), double(delta.b), 6 / (4 + 1e-5))
    assert np.abs(double(delta.fold(module.weight)) - want).max() < 1e-5
    assert np.abs(double(through(module, delta, x)) - (double(x) @ want.T + double(module.bias))).max() < 1e-5
    assert torch.allclose(folded(module, delta, x), through(module, delta, x), atol=1e-5)
    assert sum(p.numel() for p in delta.parameters()) == AdaLoRA.n_params(layer_of(module), CONFIG) == 4 * 16


def test_gradients() -> None:
    module = linear(5, 4)
    assert gradients_hold(lambda: (module, moved(delta_on(module, CONFIG))), rows(2, 5))


def test_a_new_delta_changes_nothing_and_learns_in_two_steps() -> None:
    module, x = linear(9, 6), rows(4, 9)
    delta = delta_on(module, CONFIG)
    assert torch.equal(through(module, delta, x), module(x))
    assert learns_in_two_steps(module, delta, x)


def test_scores_are_the_papers() -> None:
    delta = moved(delta_on(linear(9, 6), CONFIG))
    seen: dict[str, list[Any]] = {"a": [], "e": [], "b": []}
    kept: dict[str, Any] = dict.fromkeys(seen)
    for seed in range(3):
        for name in seen:
            w, grad = getattr(delta, name), rows(*getattr(delta, name).shape, seed=seed)
            seen[name].append((double(w), double(grad)))
            kept[name] = sensitivity(kept[name], w, grad, CONFIG)
    want = oracle.triplets(*(oracle.scores(seen[n], 0.85, 0.85) for n in ("a", "e", "b")))
    assert np.abs(double(triplet_scores(kept["a"], kept["e"], kept["b"])) / want - 1).max() < 1e-4


def peft_allocator(**settings: Any) -> Any:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q = nn.Linear(9, 6), nn.Linear(6, 9)

    config = peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=["p", "q"], **settings)
    net = peft.get_peft_model(Net(), config)
    return RankAllocator(net.base_model.model, config, "default"), net.base_model.model


def test_the_budget_falls_as_in_peft() -> None:
    allocator, _ = peft_allocator(tinit=5, tfinal=10, deltaT=3, total_step=60)
    config = AdaLoRAConfig(rank=4, target_rank=2, start=5, final=10, every=3)
    ours = [budget(step, 60, 2, config) for step in range(1, 61)]
    assert ours == [allocator.budget_schedule(step) for step in range(1, 61)]
    assert ours[0] == (8, False)
    assert ours[-1] == (4, True)


def test_the_choice_is_pefts() -> None:
    torch.manual_seed(0)
    allocator, net = peft_allocator(total_step=60)
    scores: dict[str, torch.Tensor] = {}
    for name in ("p", "q"):
        layer, config, parts = getattr(net, name), AdaLoRAConfig(rank=4, target_rank=2), {}
        nn.init.normal_(layer.lora_E["default"])
        for factor in ("lora_A", "lora_E", "lora_B"):
            w = getattr(layer, factor)["default"]
            w.grad = torch.randn_like(w)
            parts[factor] = sensitivity(None, w, w.grad, config)
        e = parts["lora_E"]
        scores[name] = triplet_scores(parts["lora_A"], type(e)(e.mean[:, 0], e.uncertainty[:, 0]), parts["lora_B"])
    allocator.update_ipt(net)
    theirs = allocator.mask_to_budget(net, 5)
    for name, kept in choose(scores, 5).items():
        assert kept.tolist() == theirs[f"{name}.lora_E.default"]


def test_ties_and_full_budgets_keep_exactly_as_many_as_asked() -> None:
    scores = {"a": torch.zeros(3), "b": torch.zeros(2)}
    assert [int(sum(k.sum() for k in choose(scores, n).values())) for n in range(6)] == [0, 1, 2, 3, 4, 5]


def test_a_dropped_triplet_is_gone_until_its_e_moves() -> None:
    delta = moved(delta_on(linear(9, 6), CONFIG))
    delta.keep_(torch.tensor([True, False, True, False]))
    assert int(torch.linalg.matrix_rank(delta.fold(torch.zeros(6, 9)))) == 2


def test_the_penalty() -> None:
    deltas = [moved(delta_on(linear(9, 6), CONFIG), seed=s) for s in (1, 2)]
    want = oracle.penalty([(double(d.a), double(d.b)) for d in deltas])
    assert orthogonality(deltas).item() == pytest.approx(want, rel=1e-5)
    for delta in deltas:
        delta.a.data = torch.linalg.qr(delta.a.data.T)[0].T
        delta.b.data = torch.linalg.qr(delta.b.data)[0]
    assert orthogonality(deltas).item() < 1e-5


TARGETS = ("q_proj", "v_proj", "down_proj")


def test_peft_reads_ours(tiny_model: Path, tmp_path: Path) -> None:
    assert drift_there(tiny_model, CONFIG, TARGETS, tmp_path / "a") < 1e-4


@pytest.mark.parametrize("alpha", [16, 0])
def test_we_read_pefts(tiny_model: Path, tmp_path: Path, alpha: int) -> None:
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=alpha, target_modules=list(TARGETS), total_step=10, tinit=1, tfinal=1
    )
    assert drift_here(tiny_model, config, tmp_path / "a") < 1e-4


def test_an_adapter_stored_without_its_dropped_triplets(tiny_model: Path, tmp_path: Path) -> None:
    """PEFT slices away what its schedule has dropped and names it in rank_pattern."""
    drift_there(tiny_model, CONFIG, TARGETS, tmp_path / "a")
    path, kept = "model.layers.0.self_attn.q_proj", [True, False, True, False]
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    fields["rank_pattern"] = {f"{path}.lora_E": kept}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(fields))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for factor, cut in (("A", lambda t: t[kept]), ("E", lambda t: t[kept]), ("B", lambda t: t[:, kept])):
        key = f"base_model.model.{path}.lora_{factor}"
        tensors[key] = cut(tensors[key]).contiguous()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "veneer.json").unlink()
    model = fresh(tiny_model)
    adapter = load_adapter(model, tmp_path / "a")
    assert adapter.deltas[path].a.shape[0] == 2
    there = logits(peft_loads(tiny_model, tmp_path / "a"))
    assert float((logits(model) - there).abs().max()) < 1e-4
    adapter.save(tmp_path / "b")
    assert float((logits(peft_loads(tiny_model, tmp_path / "b")) - there).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "adalora.rank must be at least 1, got 0"),
        ({"rank": 4, "target_rank": 6}, "target_rank 6 is above adalora.rank 4"),
        ({"every": 0, "beta1": 1.0}, r"every must be at least 1, got 0\nadalora.beta1 must be in \(0, 1\), got 1.0"),
        ({"dropout": -0.1}, "adalora.dropout"),
        ({"kept_pattern": {"q": 20}}, "adalora.kept must be from 0 to rank 12, got 20"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaLoRAConfig(**settings)


def test_what_it_does_not_read() -> None:
    with pytest.raises(AdapterMismatch, match="uses use_rslora, bias, which veneer does not read"):
        AdaLoRA.from_peft({"peft_type": "ADALORA", "use_rslora": True, "bias": "all"})


def test_a_training_that_calls_all_of_it_ends_within_its_budget() -> None:
    """As a loop has to: step, then sensitivities of new values with the step's gradients, then the choice."""
    config, total = AdaLoRAConfig(rank=4, target_rank=1, start=5, final=5, every=2, orthogonality=0.01), 40
    layers = {"p": linear(9, 6, seed=1), "q": linear(6, 9, seed=2)}
    deltas = {path: delta_on(module, config, seed=n) for n, (path, module) in enumerate(layers.items())}
    x, wanted = rows(64, 9), {path: linear(m.in_features, m.out_features, seed=7) for path, m in layers.items()}
    optimizer = torch.optim.Adam([p for d in deltas.values() for p in d.parameters()], lr=0.05)
    seen: dict[tuple[str, str], Any] = {}
    kept: dict[str, torch.Tensor] = {}
    losses, counts = [], []
    for step in range(1, total + 1):
        h, want = x, x
        for path, module in layers.items():
            h, want = through(module, deltas[path], h), wanted[path](want)
        loss = (h - want).square().mean()
        optimizer.zero_grad()
        (loss + config.orthogonality * orthogonality(deltas.values())).backward()
        optimizer.step()
        losses.append(loss.item())
        allowed, choosing = budget(step, total, len(deltas), config)
        if step < total - config.final:
            for path, delta in deltas.items():
                for name, parameter in delta.named_parameters():
                    seen[path, name] = sensitivity(seen.get((path, name)), parameter, parameter.grad, config)
        if choosing and step <= total - config.final:
            scores = {path: triplet_scores(*(seen[path, n] for n in ("a", "e", "b"))) for path in deltas}
            kept = choose(scores, allowed)
        if choosing:
            for path, delta in deltas.items():
                delta.keep_(kept[path])
        counts.append(sum(int(torch.count_nonzero(d.e)) for d in deltas.values()))
    assert counts[4] == 8
    assert counts[-1] == 2
    assert losses[-1] < 0.9 * losses[0]


def trained_by(whole: bool, total: int = 40) -> list[torch.Tensor]:
    """e of two layers after a training: by `penalty` and `stepped_`, or by the pure functions one after the other."""
    config = AdaLoRAConfig(rank=4, target_rank=1, start=5, final=5, every=2, orthogonality=0.01)
    layers = [linear(9, 6, seed=1), linear(6, 9, seed=2)]
    deltas = [delta_on(module, config, seed=n) for n, module in enumerate(layers)]
    x, wanted = rows(64, 9), [linear(m.in_features, m.out_features, seed=7) for m in layers]
    optimizer = torch.optim.Adam([p for d in deltas for p in d.parameters()], lr=0.05)
    seen: dict[tuple[int, str], Any] = {}
    for step in range(1, total + 1):
        h, want = x, x
        for module, delta, other in zip(layers, deltas, wanted, strict=True):
            h, want = through(module, delta, h), other(want)
        optimizer.zero_grad()
        (h - want).square().mean().backward()
        penalty = AdaLoRA.penalty(deltas, config) if whole else config.orthogonality * orthogonality(deltas)
        assert penalty is not None
        penalty.backward()
        optimizer.step()
        if whole:
            AdaLoRA.stepped_(deltas, config, step, total)
            continue
        for n, delta in enumerate(deltas):
            for name, p in delta.named_parameters():
                if step < total - config.final:
                    seen[n, name] = sensitivity(seen.get((n, name)), p, p.grad, config)
        allowed, choosing = budget(step, total, 2, config)
        if choosing:
            kept = choose({str(n): triplet_scores(*(seen[n, k] for k in ("a", "e", "b"))) for n in (0, 1)}, allowed)
            for n, delta in enumerate(deltas):
                delta.keep_(kept[str(n)])
    return [d.e.detach().clone() for d in deltas]


def test_what_the_loop_calls_is_the_pure_functions_put_together() -> None:
    for ours, slow in zip(trained_by(True), trained_by(False), strict=True):
        assert torch.equal(ours, slow)
    assert sum(int(torch.count_nonzero(e)) for e in trained_by(True)) == 2


def test_a_run_drops_triplets_down_to_the_target(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one two", "completion": "three four"}\n' * 12, encoding="utf-8")
    recipe = recipe_from(
        {
            "model": str(tiny_model),
            "method": {"name": "adalora", "rank": 3, "target_rank": 1, "targets": ["q_proj", "v_proj"]},
            "data": {"train": str(tmp_path / "rows.jsonl")},
            "optimizer": {"lr": 1e-2},
            "train": {"steps": 8, "tokens_per_step": 64, "max_length": 64, "dtype": "float32"},
            "run": str(tmp_path / "run"),
        }
    )
    _, job = train_recipe(recipe)
    assert job is not None
    deltas = list(job.adapter.deltas.values())
    assert sum(int(torch.count_nonzero(d.get_parameter("e"))) for d in deltas) == len(deltas)


def test_a_run_too_short_for_its_schedule_is_refused() -> None:
    config = AdaLoRAConfig(rank=2, target_rank=1, start=3, final=3)
    with pytest.raises(ConfigError, match=r"leave none of the run's 6 steps .* train longer"):
        AdaLoRA.stepped_([delta_on(linear(4, 4), config)], config, 1, 6)
