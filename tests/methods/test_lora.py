"""LoRA against its paper: linear, GPT-2 Conv1D, embedding and convolutions, beside an oracle in NumPy."""

import warnings
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.methods.layers import delta_on, linear, moved, rows, through
from tests.oracles import lora as oracle
from veneer.errors import AdapterMismatch, ConfigError, NotFoldable
from veneer.methods.lora import LoRA, LoRAConfig


def numpy(t: torch.Tensor) -> Any:
    return t.detach().double().numpy()


@pytest.mark.parametrize(("d", "o"), [(5, 5), (9, 4), (4, 9)])
@pytest.mark.parametrize("stable", [False, True])
def test_linear_is_the_papers(d: int, o: int, stable: bool) -> None:
    module = linear(d, o)
    delta, x = moved(delta_on(module, LoRAConfig(rank=3, alpha=5, rank_stabilized=stable))), rows(4, d)
    s = oracle.scale(5, 3, stable)
    want = oracle.linear(*map(numpy, (x, module.weight, module.bias, delta.a, delta.b)), s)
    assert np.allclose(numpy(through(module, delta, x)), want, atol=1e-5)


def test_gpt2_conv1d_is_the_papers_on_its_transpose() -> None:
    module = Conv1D(9, 5)
    delta, x = moved(delta_on(module, LoRAConfig(rank=3))), rows(4, 5)
    assert delta.a.shape == (3, 5)
    assert delta.b.shape == (9, 3)
    want = oracle.linear(*map(numpy, (x, module.weight.T, module.bias, delta.a, delta.b)), 16 / 3)
    assert np.allclose(numpy(through(module, delta, x)), want, atol=1e-5)


def test_embedding_is_the_papers_with_a_one_hot_input() -> None:
    module = nn.Embedding(7, 4, padding_idx=1)
    delta, x = moved(delta_on(module, LoRAConfig(rank=3))), torch.tensor([[0, 6, 1], [3, 3, 2]])
    want = oracle.embedding(x.reshape(-1).numpy(), *map(numpy, (module.weight, delta.a, delta.b)), 16 / 3)
    assert np.allclose(numpy(through(module, delta, x)).reshape(6, 4), want, atol=1e-5)


def test_the_padding_word_gets_no_gradient_as_in_the_layer_itself() -> None:
    delta = moved(delta_on(nn.Embedding(7, 4, padding_idx=1), LoRAConfig(rank=3)))
    delta(torch.tensor([1, 2]), torch.zeros(2, 4)).sum().backward()
    assert torch.count_nonzero(delta.a.grad[:, 1]) == 0
    assert torch.count_nonzero(delta.a.grad[:, 2]) == 3


def test_an_embedding_that_scales_its_rows_scales_the_update() -> None:
    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.embed_scale

    module = Scaled(7, 4)
    delta, x = moved(delta_on(module, LoRAConfig(rank=2))), torch.tensor([0, 5])
    want = 3 * oracle.embedding(x.numpy(), *map(numpy, (module.weight, delta.a, delta.b)), 16 / 2)
    assert np.allclose(numpy(through(module, delta, x)), want, atol=1e-5)


WALKS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": 2, "groups": 2},
    {"kernel_size": 3, "groups": 4, "padding": 1, "dilation": 2},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 4, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": "valid"},
    *({"kernel_size": 3, "padding": 2, "padding_mode": m} for m in ("circular", "reflect", "replicate")),
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 2, "dilation": 2, "groups": 2},
]


@pytest.mark.parametrize("walk", WALKS, ids=lambda w: ",".join(f"{k}={v}" for k, v in w.items()))
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_convolutions_are_one_changed_weight(kind: type[nn.Conv1d], walk: dict[str, Any]) -> None:
    space = (7,) if kind is nn.Conv1d else (7, 6)
    module = kind(4, 8, **walk)
    delta, x = moved(delta_on(module, LoRAConfig(rank=4, alpha=6))), rows(1, 4, *space)
    update = oracle.conv_update(numpy(delta.a), numpy(delta.b), 6 / 4, module.groups)
    assert np.allclose(numpy(delta.fold(module.weight)), numpy(module.weight) + update, atol=1e-5)
    if isinstance(module.padding, str):
        spare = [
            d * (k - 1) if walk["padding"] == "same" else 0
            for k, d in zip(module.kernel_size, module.dilation, strict=True)
        ]
        padding = [(n // 2, n - n // 2) for n in spare]
    else:
        padding = [(p, p) for p in module.padding]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the copy that an even kernel with "same" takes
        there = through(module, delta, x)
    want = oracle.conv(
        numpy(x[0]), numpy(module.weight) + update, numpy(module.bias), module.stride, padding, module.dilation,
        module.groups, module.padding_mode,
    )  # fmt: skip
    assert np.allclose(numpy(there[0]), want, atol=1e-5)


def test_an_image_without_a_batch_is_changed_too() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1)
    delta, x = moved(delta_on(module, LoRAConfig(rank=2))), rows(1, 2, 5, 5)
    assert torch.allclose(through(module, delta, x[0]), through(module, delta, x)[0], atol=1e-6)


def test_no_rows_are_no_rows() -> None:
    module = linear(4, 6)
    delta = moved(delta_on(module, LoRAConfig(rank=2)))
    assert through(module, delta, torch.zeros(0, 3, 4)).shape == (0, 3, 6)
    assert through(module, delta, torch.zeros(4)).shape == (6,)


@pytest.mark.parametrize(
    ("module", "bound"),
    [(nn.Linear(64, 8), 64**-0.5), (Conv1D(8, 64), 64**-0.5), (nn.Conv2d(8, 8, 3), 72**-0.5)],
    ids=["linear", "gpt2", "conv"],
)
def test_a_starts_uniform_and_b_at_zero(module: nn.Module, bound: float) -> None:
    delta = delta_on(module, LoRAConfig(rank=64))
    assert 0.97 * bound < delta.a.abs().max() <= bound
    assert delta.a.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert torch.count_nonzero(delta.b) == 0


def test_an_embedding_starts_the_other_way_round() -> None:
    delta = delta_on(nn.Embedding(50, 64), LoRAConfig(rank=16))
    assert torch.count_nonzero(delta.a) == 0
    assert delta.b.std().item() == pytest.approx(1.0, rel=0.1)


def test_at_the_start_only_b_learns() -> None:
    """Section 4.1: B = 0, so A's gradient is 0 and B's is not."""
    module = linear(6, 5)
    delta = delta_on(module, LoRAConfig(rank=2))
    through(module, delta, rows(3, 6)).square().sum().backward()
    assert torch.count_nonzero(delta.a.grad) == 0
    assert torch.count_nonzero(delta.b.grad) == delta.b.numel()


def test_dropout_touches_only_the_deltas_input_and_only_in_training() -> None:
    module = linear(400, 3)
    delta, x = moved(delta_on(module, LoRAConfig(rank=2, dropout=0.5))), torch.ones(1, 400)
    y = module(x)
    assert not torch.equal(delta.train()(x, y), delta(x, y))
    assert torch.equal(delta.eval()(x, y), delta(x, y))
    kept = delta.train().dropout(x)
    assert sorted(set(kept.flatten().tolist())) == [0.0, 2.0]
    assert 100 < int(kept.count_nonzero()) < 300


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dropout": 1.0}, r"lora\.dropout must be in \[0, 1\), got 1\.0"),
        ({"dropout": -0.1}, r"lora\.dropout must be in \[0, 1\), got -0\.1"),
        ({"init": "zeros"}, r"lora\.init: there is no init 'zeros'\. Known: eva, gaussian, pissa, random, uniform\."),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoRAConfig(**settings)


def test_a_rank_that_the_groups_do_not_share_is_refused() -> None:
    said = r"lora\.rank 3 is not divisible by the 2 groups of a convolution with 4 inputs; use a multiple of 2 for it"
    with pytest.raises(ConfigError, match=said):
        delta_on(nn.Conv1d(4, 4, 1, groups=2), LoRAConfig(rank=3))


def test_a_grouped_convolution_is_saved_across_its_groups_with_zeros() -> None:
    delta = moved(delta_on(nn.Conv1d(4, 6, 3, groups=2), LoRAConfig(rank=4)))
    a = delta.tensors()["lora_A.weight"]
    assert a.shape == (4, 4, 3)
    assert torch.equal(a[:2, :2], delta.a[:2])
    assert torch.equal(a[2:, 2:], delta.a[2:])
    assert torch.count_nonzero(a[:2, 2:]) == torch.count_nonzero(a[2:, :2]) == 0
    assert delta.tensors()["lora_B.weight"].shape == (6, 2, 1)


def test_a_grouped_convolution_trained_in_peft_mixes_groups_and_is_kept_but_not_folded() -> None:
    module = nn.Conv1d(4, 6, 3, groups=2, padding=1)
    delta, x = delta_on(module, LoRAConfig(rank=4, alpha=8)), rows(1, 4, 5)
    a, b = rows(4, 4, 3, seed=7), rows(6, 2, 1, seed=8)
    delta.load_({"lora_A.weight": a, "lora_B.weight": b})
    inner = oracle.conv(numpy(x[0]), numpy(a), np.zeros(4), (1,), [(1, 1)], (1,))  # PEFT's A knows no groups
    outer = oracle.conv(inner, numpy(b), np.zeros(6), (1,), [(0, 0)], (1,), groups=2)
    want = numpy(module(x)[0]) + 2 * outer
    assert np.allclose(numpy(through(module, delta, x)[0]), want, atol=1e-5)
    assert torch.equal(delta.tensors()["lora_A.weight"], a)
    with pytest.raises(NotFoldable, match="mixes channels across groups"):
        delta.fold(module.weight)


def test_peft_settings_and_ours() -> None:
    config = LoRAConfig(
        rank=4,
        alpha=9,
        dropout=0.1,
        rank_stabilized=True,
        init="gaussian",
        rank_pattern={"q": 2},
        alpha_pattern={"k": 3},
    )
    fields = LoRA.to_peft(config)
    assert fields == {
        "peft_type": "LORA", "r": 4, "lora_alpha": 9, "lora_dropout": 0.1, "use_rslora": True,
        "init_lora_weights": "gaussian", "rank_pattern": {"q": 2}, "alpha_pattern": {"k": 3}, "bias": "none",
    }  # fmt: skip
    assert LoRA.from_peft(fields) == config
    assert LoRA.from_peft({"peft_type": "LORA"}) == LoRAConfig(rank=8, alpha=8)
    assert LoRA.from_peft({"peft_type": "IA3"}) is None
    assert LoRA.from_peft({"peft_type": "LORA", "use_dora": True}) is None


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_starts_that_leave_the_base_alone_are_read(init: Any) -> None:
    assert LoRA.from_peft({"peft_type": "LORA", "init_lora_weights": init}) is not None


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "tomorrow's", ["x"]])
def test_starts_that_change_the_base_are_refused(init: Any) -> None:
    with pytest.raises(AdapterMismatch, match="which changes the base weights too") as caught:
        LoRA.from_peft({"peft_type": "LORA", "init_lora_weights": init})
    assert repr(init) in str(caught.value)


NOT_READ = {
    "bias": "all", "lora_bias": True, "layer_replication": [[0, 1]],
    "target_parameters": ["w"], "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 1}, "kasa_config": {"x": 1}, "monteclora_config": {"x": 1}, "use_qalora": True,
    "use_bdlora": {"nblocks": 2}, "use_something_new": True,
}  # fmt: skip


def test_everything_of_peft_that_is_not_read_is_refused_at_once() -> None:
    with pytest.raises(AdapterMismatch, match="which veneer does not read") as caught:
        LoRA.from_peft({"peft_type": "LORA", **NOT_READ})
    assert all(name in str(caught.value) for name in NOT_READ)
    off = dict.fromkeys(NOT_READ) | {"bias": "none", "use_rslora": True}
    assert LoRA.from_peft({"peft_type": "LORA", **off}) == LoRAConfig(rank=8, alpha=8, rank_stabilized=True)


@pytest.mark.parametrize(("r", "stable"), list(product([1, 3, 16], [False, True])))
def test_scale(r: int, stable: bool) -> None:
    assert LoRAConfig(rank=r, alpha=5, rank_stabilized=stable).scale == pytest.approx(oracle.scale(5, r, stable))
