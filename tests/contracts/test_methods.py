"""What every method in the registry owes: a new one is found by itself and has to pass all of this.

Each method is tried on every layer below whose kind it takes and that it does not refuse.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.methods.layers import delta_on, layer_of, moved, rows
from veneer.adapters.attach import attach, load_adapter
from veneer.adapters.layer_view import is_transposed
from veneer.errors import AdapterMismatch, ConfigError, NotFoldable
from veneer.methods.base import METHODS, Delta, Kind, MethodConfig, Role, config_from
from veneer.methods.init import INITS
from veneer.methods.lora import LoRAConfig
from veneer.methods.restartable import Restartable

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {"rank": 4},
        {"rank": 2, "alpha": 3.0, "rank_stabilized": True, "init": "gaussian"},
        *({"rank": 3, "init": name} for name in INITS if INITS[name].no_change),
    ],
    "dora": [{"rank": 4}],
    "mora": [{"rank": 2, "variant": v} for v in ("truncation", "sharing", "decoupling", "rotation")],
    "ia3": [{}, {"feedforward": ".*"}],
    "adalora": [{"rank": 4, "target_rank": 2}],
    "bottleneck": [{"size": 4}, {"size": 4, "variant": "parallel", "scale": 4.0}],
}
"""Where a method's defaults do not do on layers this small, or do not show all it has."""
NO_TRUE_GRADIENT = {"dora"}
"""Methods whose paper holds a part constant in the gradient, so that finite differences must disagree."""

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "square": (lambda: nn.Linear(8, 8), (3, 8)),
    "wide": (lambda: nn.Linear(12, 7), (2, 3, 12)),
    "tall, no bias": (lambda: nn.Linear(7, 12, bias=False), (3, 7)),
    "gpt2": (lambda: Conv1D(9, 6), (2, 3, 6)),
    "block": (lambda: nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 6)), (3, 8)),
    "norm": (lambda: nn.LayerNorm(8), (3, 8)),
    "embedding": (lambda: nn.Embedding(11, 6), (3, 4)),
    "padded embedding": (lambda: nn.Embedding(11, 6, padding_idx=2), (3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv1d dilated": (lambda: nn.Conv1d(4, 6, 3, dilation=2, padding=2, bias=False), (2, 4, 9)),
    "conv1d circular": (lambda: nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 9)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 5, padding="same", padding_mode="replicate", dilation=2), (2, 4, 9)),
    "conv1d grouped": (lambda: nn.Conv1d(8, 4, 3, groups=2, padding=1), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 3, 7, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="reflect"), (2, 3, 6, 5)),
    "conv2d replicate": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="replicate", stride=2), (2, 3, 6, 5)),
    "conv2d same": (lambda: nn.Conv2d(3, 5, (3, 5), padding="same"), (2, 3, 6, 5)),
    "conv2d same circular": (lambda: nn.Conv2d(3, 5, (3, 4), padding="same", padding_mode="circular"), (2, 3, 6, 5)),
    "conv2d valid": (lambda: nn.Conv2d(3, 5, 1, padding="valid"), (2, 3, 6, 5)),
    "conv2d grouped": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, dilation=2, padding_mode="circular"),
        (2, 4, 6, 6),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=1), (2, 2, 3, 4, 3)),
}


def layer_named(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module = LAYERS[name][0]()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)  # GPT-2's Conv1D begins near 0, its bias at 0
    return module


def input_for(module: nn.Module, name: str) -> Tensor:
    shape = LAYERS[name][1]
    if isinstance(module, nn.Embedding):
        return torch.randint(0, module.num_embeddings, shape, generator=torch.Generator().manual_seed(2))
    return rows(*shape)


def cases() -> Iterator[Any]:
    for method in METHODS:
        for settings in SETTINGS.get(method, [{}]):
            for name in LAYERS:
                module = layer_named(name)
                config = config_from(method, settings)
                if layer_of(module).kind not in METHODS[method].kinds:
                    continue
                try:
                    delta_on(module, config)
                except ConfigError:
                    continue  # refused by name; the method's own test says why
                detail = ",".join(str(v) for v in settings.values())
                yield pytest.param(config, name, id=f"{method}({detail})-{name}")


CASES = list(cases())
every_case = pytest.mark.parametrize(("config", "name"), CASES)
restartable_cases = [case for case in CASES if issubclass(METHODS[case.values[0].method], Restartable)]


class Whole(nn.Module):
    """A layer with its delta: what the hooks of an attached adapter do."""

    def __init__(self, module: nn.Module, delta: Delta) -> None:
        super().__init__()
        self.module, self.delta = module, delta

    def forward(self, x: Tensor) -> Tensor:
        x = self.delta.before(x)
        changed: Tensor = self.delta(x, self.module(x))
        return changed


class Net(nn.Module):
    """The smallest model with the layer in it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.layer = module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def folded(module: nn.Module, delta: Delta) -> nn.Module:
    """The layer alone, with the delta folded into its weight and bias."""
    layer, alone = layer_of(module), copy.deepcopy(module)
    w = delta.fold(torch.zeros(0) if layer.kind == "module" else layer.weight()).detach()
    alone.register_parameter("weight", nn.Parameter((w.T if is_transposed(module) else w).contiguous()))
    if layer.bias is not None:
        alone.register_parameter("bias", nn.Parameter(delta.fold_bias(layer.bias()).detach()))
    return alone


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_a_method_takes_is_tried(method: str) -> None:
    tried = {layer_of(layer_named(p.values[1])).kind for p in CASES if p.values[0].method == method}
    assert tried == METHODS[method].kinds <= set(get_args(Kind))


@every_case
def test_no_change_at_start(config: MethodConfig, name: str) -> None:
    module = layer_named(name)
    x = input_for(module, name)
    assert torch.allclose(Whole(module, delta_on(module, config))(x), module(x), atol=2e-6, rtol=0)


@every_case
def test_forward_is_folded(config: MethodConfig, name: str) -> None:
    module = layer_named(name)
    delta, x = moved(delta_on(module, config), 0.3), input_for(module, name)
    try:
        alone = folded(module, delta)
    except NotFoldable as error:
        assert type(delta).__name__.lower() in str(error).lower()
        return
    there = Whole(module, delta)(x)
    assert not torch.allclose(there, module(x), atol=1e-3), "the moved delta changes nothing"
    assert torch.allclose(there, alone(x), atol=2e-5, rtol=1e-5)


@every_case
def test_gradients_agree_with_finite_differences(config: MethodConfig, name: str) -> None:
    if config.method in NO_TRUE_GRADIENT:
        return
    module = layer_named(name)
    whole, x = Whole(module, moved(delta_on(module, config), 0.3)).double().eval(), input_for(module, name)
    whole.module.requires_grad_(False)
    x = x[:1] if x.dtype == torch.int64 else x[:1].double().requires_grad_()
    names = [n for n, _ in whole.delta.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        given = {f"delta.{n}": v for n, v in zip(names, values, strict=True)}
        y: Tensor = torch.func.functional_call(whole, given, (x,))
        return y

    values = [p.detach().clone().requires_grad_() for p in whole.delta.parameters()]
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@every_case
def test_size_is_as_announced_and_every_parameter_has_a_role(config: MethodConfig, name: str) -> None:
    module = layer_named(name)
    delta = delta_on(module, config)
    assert sum(p.numel() for p in delta.parameters()) == type(delta).n_params(layer_of(module), config)
    assert {n.partition(".")[0] for n, _ in delta.named_parameters()} <= set(delta.roles)
    assert set(delta.roles.values()) <= set(get_args(Role))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in delta.parameters())


@every_case
def test_the_same_seed_is_the_same_delta(config: MethodConfig, name: str) -> None:
    module = layer_named(name)
    one, same = delta_on(module, config, seed=4).tensors(), delta_on(module, config, seed=4).tensors()
    assert all(torch.equal(one[k], same[k]) for k in one)


@every_case
def test_rows_are_changed_one_by_one_as_together(config: MethodConfig, name: str) -> None:
    module = layer_named(name)
    whole, x = Whole(module, moved(delta_on(module, config))).eval(), input_for(module, name)
    alone = torch.cat([whole(x[i : i + 1]) for i in range(len(x))])
    assert torch.allclose(whole(x), alone, atol=1e-5, rtol=1e-5)


@every_case
def test_under_bfloat16_the_output_is_bfloat16_and_parameters_stay_float32(config: MethodConfig, name: str) -> None:
    module = layer_named(name).to(torch.bfloat16)
    delta, x = moved(delta_on(module, config)), input_for(module, name)
    y = Whole(module, delta)(x.bfloat16() if x.is_floating_point() else x)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    for parameter in delta.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize(("config", "name"), restartable_cases)
def test_a_restart_is_no_change_again(config: MethodConfig, name: str) -> None:
    module = layer_named(name)
    delta, x = moved(delta_on(module, config)), input_for(module, name)
    delta.restart_(torch.Generator().manual_seed(0))
    assert torch.allclose(Whole(module, delta)(x), module(x), atol=2e-6, rtol=0)


@every_case
def test_tensors_are_loaded_exactly(config: MethodConfig, name: str) -> None:
    module = layer_named(name)
    saved, other = moved(delta_on(module, config)), delta_on(module, config, seed=9)
    kept = {n: p.data_ptr() for n, p in other.named_parameters()}
    other.load_({k: t.detach().clone() for k, t in saved.tensors().items()})
    for (n, a), (_, b) in zip(saved.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), n
    assert {n: p.data_ptr() for n, p in other.named_parameters()} == kept, "an optimizer would hold the old ones"


@every_case
def test_everything_that_does_not_fit_is_listed_and_nothing_is_loaded(config: MethodConfig, name: str) -> None:
    module = layer_named(name)
    delta = delta_on(module, config)
    before = {n: p.clone() for n, p in delta.named_parameters()}
    wrong: dict[str, Tensor] = {k: torch.ones(t.numel() + 1) for k, t in delta.tensors().items()}
    with pytest.raises(AdapterMismatch) as caught:
        delta.load_({**wrong, "stray": torch.ones(1)})
    for key, tensor in delta.tensors().items():
        needs = tuple(tensor.shape)
        assert f"{key}: adapter has ({tensor.numel() + 1},), model needs {needs}" in str(caught.value)
    assert "stray: in the adapter, not in the model" in str(caught.value)
    with pytest.raises(AdapterMismatch) as caught:
        delta.load_({})
    assert all(f"{key}: in the model, not in the adapter" in str(caught.value) for key in delta.tensors())
    for broken, said in ((float("nan"), "not a number"), (float("inf"), "infinite")):
        with pytest.raises(AdapterMismatch, match=said):
            delta.load_({k: torch.full_like(t, broken) for k, t in delta.tensors().items()})
    with pytest.raises(AdapterMismatch, match=r"int32, a floating-point type is needed"):
        delta.load_({k: torch.ones(t.shape, dtype=torch.int32) for k, t in delta.tensors().items()})
    assert all(torch.equal(p, before[n]) for n, p in delta.named_parameters())


@every_case
def test_settings_come_back_from_an_adapter_config(config: MethodConfig, name: str) -> None:
    fields = METHODS[config.method].to_peft(config)
    claimed = {m: c for m in METHODS if (c := METHODS[m].from_peft(fields)) is not None}
    assert list(claimed) == [config.method], "one method, and only one, may claim a folder"
    assert METHODS[config.method].to_peft(claimed[config.method]) == fields
    assert "peft_type" in fields


@every_case
def test_attached_saved_and_detached(config: MethodConfig, name: str, tmp_path: Path) -> None:
    net = Net(layer_named(name))
    bias = net.layer.bias if isinstance(getattr(net.layer, "bias", None), nn.Parameter) else None
    if bias is not None:
        bias.requires_grad_(False)  # frozen before, so it has to be frozen after
    x = input_for(net.layer, name)
    plain, state = net(x), {k: t.clone() for k, t in net.state_dict().items()}
    flags = {n: p.requires_grad for n, p in net.named_parameters()}

    adapter = attach(net, config, ("layer",), look=lambda: net(x)).eval()
    assert not any(p.requires_grad for p in net.parameters())
    for delta in adapter.deltas.values():
        moved(delta)
    there = net(x)
    assert not torch.equal(there, plain)
    adapter.save(tmp_path / "adapter")

    adapter.detach()
    assert torch.equal(net(x), plain)
    assert {n: p.requires_grad for n, p in net.named_parameters()} == flags
    now = net.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[k], state[k]) for k in state)

    again = load_adapter(net, tmp_path / "adapter")
    if isinstance(config, LoRAConfig) and config.initializer.subtracted:  # loaded as one LoRA of twice the rank
        assert torch.allclose(net(x), there, atol=1e-5)
    else:
        assert torch.equal(net(x), there)
    again.save(tmp_path / "again")
    for file in (tmp_path / "adapter").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
