"""EVA: the directions of the inputs, how ranks are shared out, and peft's own choice."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from tests.methods.layers import linear, moved, rows
from tests.methods.parity import TOKENS, fresh, logits, peft_loads
from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach, load_adapter
from veneer.errors import ConfigError
from veneer.methods.init.eva import Directions, distribute
from veneer.methods.lora import LoRAConfig


def eva(most: float = 2.0, look: int = 8192, **own: Any) -> LoRAConfig:
    return LoRAConfig(init={"name": "eva", "most": most, "look": look}, **own)


RNG = torch.Generator().manual_seed(11)
SPREAD = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.3, 0.2, 0.1])
TURN = torch.linalg.qr(torch.empty(8, 8).normal_(generator=RNG))[0]


def inputs(n: int, seed: int) -> torch.Tensor:
    """Rows that vary by SPREAD along the rows of TURN, around a mean of their own."""
    return rows(n, 8, seed=seed) * SPREAD @ TURN + 4.0


def test_batch_after_batch_gives_the_directions_of_all_rows_together() -> None:
    batches = [inputs(n, seed=n) for n in (50, 7, 120, 33)]
    directions = Directions(4)
    for batch in batches:
        directions.see(batch.reshape(1, *batch.shape))
    everything = torch.cat(batches).numpy().astype(float)
    _, values, vt = np.linalg.svd(everything - everything.mean(0), full_matrices=False)
    agree = np.abs((directions.vectors.numpy() * vt[:4]).sum(1))
    assert agree[:2].min() > 0.999  # what was cut from one batch is missing in the next, so later ones differ a little
    assert agree.min() > 0.99
    assert np.abs(directions.explained().numpy() - (values**2 / (values**2).sum())[:4]).max() < 5e-3
    assert directions.seen == 210


def test_ranks_go_where_they_explain_most() -> None:
    shares = {"flat": torch.tensor([0.3, 0.3, 0.3]), "steep": torch.tensor([0.9, 0.05, 0.04]), "none": torch.zeros(3)}
    assert distribute(shares, 4) == {"flat": 3, "steep": 1, "none": 0}
    assert distribute(shares, 5) == {"flat": 3, "steep": 2, "none": 0}
    assert sum(distribute(shares, 9).values()) == 9


def two_layers() -> nn.Module:
    return nn.Sequential(linear(8, 6, seed=1), linear(6, 8, seed=2))


def test_a_starts_from_the_directions_and_nothing_changes() -> None:
    net, x = two_layers(), inputs(64, 5)
    plain = net(x)
    adapter = attach(net, eva(rank=2, alpha=4, most=1.0), look=lambda: net(x))
    assert torch.equal(net(x), plain)
    first: Any = adapter.deltas["0"]
    assert torch.allclose((first.a @ TURN.T).abs(), torch.eye(8)[:2], atol=0.3)
    assert torch.allclose(first.a @ first.a.T, torch.eye(2), atol=1e-5)
    assert all(not m._forward_pre_hooks for m in net.modules()), "no watching hook is left"


@pytest.mark.parametrize("stabilized", [False, True])
def test_the_scale_stays_and_the_ranks_add_up(stabilized: bool) -> None:
    net, x = two_layers(), inputs(64, 5)
    config = eva(rank=3, alpha=6, rank_stabilized=stabilized)
    adapter = attach(net, config, look=lambda: net(x))
    ranks = {path: d.a.shape[0] for path, d in adapter.deltas.items()}  # type: ignore[union-attr]
    assert sum(ranks.values()) == 6
    assert max(ranks.values()) <= 6
    assert all(d.scale == pytest.approx(config.scale) for d in adapter.deltas.values())  # type: ignore[union-attr]


def test_a_layer_that_varies_too_little_gets_no_delta(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steep, self.flat = linear(8, 6, seed=1), linear(8, 6, seed=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.steep(x @ torch.diag(torch.eye(8)[0])) + self.flat(x)
            return out

    net, x = Net(), rows(500, 8)
    adapter = attach(net, eva(rank=1, most=2.0), ("steep", "flat"), look=lambda: net(x))
    ranks = {path: d.a.shape[0] for path, d in adapter.deltas.items()}  # type: ignore[union-attr]
    assert ranks == {"steep": 1, "flat": 1}
    shared = attach(two := Net(), eva(rank=1), ("steep",), look=lambda: two(x))
    assert list(shared.deltas) == ["steep"]
    moved(shared.deltas["steep"])
    want = two(x)
    shared.save(tmp_path / "a")
    shared.detach()
    assert load_adapter(two, tmp_path / "a").settings.method == "lora"
    assert torch.equal(two(x), want)


TARGETS = ("q_proj", "v_proj", "down_proj")


def begun(model: Any, **settings: Any) -> Adapter:
    return attach(model, eva(rank=2, alpha=4, **settings), TARGETS, look=lambda: model(TOKENS))


def test_peft_reads_ours_with_its_ranks(tiny_model: Path, tmp_path: Path) -> None:
    model = fresh(tiny_model)
    adapter = attach(model, eva(rank=4, alpha=8), TARGETS, look=lambda: model(TOKENS))
    ranks = {path: d.a.shape[0] for path, d in adapter.deltas.items()}  # type: ignore[union-attr]
    assert sum(ranks.values()) == 24
    assert len(set(ranks.values())) > 1, "the ranks should differ, or this shows nothing"
    for n, delta in enumerate(adapter.deltas.values()):
        moved(delta, 0.3, seed=n)
    want = logits(model)
    adapter.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["init_lora_weights"] is True
    assert float((logits(peft_loads(tiny_model, tmp_path / "a")) - want).abs().max()) < 1e-4
    adapter.detach()
    loaded = load_adapter(model, tmp_path / "a")
    assert isinstance(loaded.settings, LoRAConfig)
    assert torch.equal(logits(model), want)


def test_the_directions_are_pefts(tiny_model: Path) -> None:
    """On one batch, which both see whole; peft needs it twice to call it converged."""
    model = fresh(tiny_model)
    adapter = begun(model, most=1.0)
    config = peft.LoraConfig(
        r=2, target_modules=list(TARGETS), init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0, tau=0.5)
    )
    batch = {"input_ids": TOKENS}
    found = peft.get_eva_state_dict(fresh(tiny_model), [batch], config, show_progress_bar=False)
    for path, delta in adapter.deltas.items():
        theirs, ours = found[path].float(), delta.a.detach()  # type: ignore[union-attr]
        inside = torch.linalg.matrix_norm(theirs @ ours.T).square() / 2  # 1: the same plane
        assert inside > 0.95, path


def test_bad_input() -> None:
    net = two_layers()
    with pytest.raises(ConfigError, match="lora starts from its layers' inputs: give `look`"):
        attach(net, eva())
    with pytest.raises(ConfigError, match=r"lora.init eva saw no input of 0, 1 \(2 in all\); look at more rows"):
        attach(net, eva(), look=lambda: None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(ConfigError, match=r"^lora.init: eva.most must be at least 1, got 0.5$"):
        eva(most=0.5)
    with pytest.raises(ConfigError, match=r"eva.look must be at least 1, got 0"):
        eva(look=0)
    with pytest.raises(ConfigError, match=r"lora.init eva starts on layers of kind linear only.*kind embedding"):
        attach(nn.Sequential(nn.Embedding(4, 4)), eva(), ("0",), look=lambda: None)


def test_after_a_restart_a_is_drawn() -> None:
    net, x = two_layers(), inputs(64, 5)
    plain = net(x)
    delta: Any = attach(net, eva(rank=2, most=1.0), look=lambda: net(x)).deltas["0"]
    first = delta.a.detach().clone()
    delta.restart_(torch.Generator().manual_seed(3))
    want = torch.empty(2, 8).uniform_(-(8**-0.5), 8**-0.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(delta.a, want) and not torch.equal(first, want)
    assert torch.equal(net(x), plain)
