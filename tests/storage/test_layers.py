"""Stored layers mean what the dense ones mean, and write what they were."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from transformers.pytorch_utils import Conv1D

from tests.storage.cases import weight
from veneer.errors import ModelError, TargetError
from veneer.storage import config_from
from veneer.storage.layers import StoredEmbedding, StoredLinear, store_, stored

KINDS = ["dense", "nf4", "fp4", "int8"]


class Tiny(nn.Module):
    """An embedding with a tied head, a linear layer and a Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 64)
        self.body = nn.ModuleDict({"linear": nn.Linear(64, 96), "conv": Conv1D(64, 96)})
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.body["conv"](torch.tanh(self.body["linear"](self.embed(ids)))))
        return y


PATHS = ["head", "body.linear", "body.conv", "embed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer(kind: str, bias: bool) -> None:
    layer = nn.Linear(96, 50, bias=bias)
    new = stored(layer, config_from(kind, {}))
    x = torch.randn(2, 3, 96)
    want = F.linear(x, new.dense(torch.float32), layer.bias)
    assert torch.allclose(new(x), want, atol=1e-5)
    assert isinstance(new, nn.Linear)
    assert (new.in_features, new.out_features) == (96, 50)


@pytest.mark.parametrize("kind", KINDS)
def test_a_conv1d_is_turned(kind: str) -> None:
    layer = Conv1D(50, 96)
    new = stored(layer, config_from(kind, {}))
    assert isinstance(new, StoredLinear)
    assert new.dense(torch.float32).shape == (50, 96)
    x = torch.randn(3, 96)
    assert torch.allclose(new(x), layer(x), atol=0.25)
    layer.weight.data.copy_(new.dense(torch.float32).T)
    assert torch.allclose(new(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 64), (11, 50), (7, 33)])
def test_an_embedding(kind: str, shape: tuple[int, int]) -> None:
    layer = nn.Embedding(*shape, padding_idx=2).to(torch.bfloat16)
    layer.weight.data.copy_(weight(shape))
    new = stored(layer, config_from(kind, {}))
    ids = torch.tensor([[0, 2, 5], [6, 6, 1]])
    assert new(ids).dtype == torch.bfloat16
    assert torch.equal(new(ids), F.embedding(ids, new.dense(torch.bfloat16).T))
    assert new.dense(torch.float32).shape == (shape[1], shape[0])
    with pytest.raises(IndexError, match=r"outside \[0, "):
        new(torch.tensor([shape[0]]))


def test_a_scaled_embedding_keeps_its_scale() -> None:
    layer = nn.Embedding(10, 64)
    layer.embed_scale = 8.0  # type: ignore[assignment]
    new = stored(layer, config_from("nf4", {}))
    ids = torch.arange(10)
    assert torch.equal(new(ids), 8.0 * new.dense(torch.float32).T)


def test_an_embedding_that_changes_itself_stays_dense() -> None:
    with pytest.raises(TargetError, match="max_norm"):
        stored(nn.Embedding(10, 8, max_norm=1.0), config_from("nf4", {}), "embed.weight")
    with pytest.raises(TargetError, match=r"norm\.weight: a LayerNorm has no weight that a storage supports"):
        stored(nn.LayerNorm(8), config_from("nf4", {}), "norm.weight")


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_with_a_tied_head(kind: str) -> None:
    model, dense = Tiny(), Tiny()
    store_(model, config_from(kind, {}), PATHS)
    embed, head, linear, conv = (model.get_submodule(p) for p in ("embed", *PATHS[:3]))
    assert isinstance(embed, StoredEmbedding)
    assert isinstance(head, StoredLinear)
    assert head.storage is embed.storage
    dense.embed.weight.data.copy_(embed.dense(torch.float32).T)
    dense.body["linear"].weight.data.copy_(linear.dense(torch.float32))
    dense.body["conv"].weight.data.copy_(conv.dense(torch.float32).T)
    ids = torch.tensor([[1, 5, 39]])
    assert torch.allclose(model(ids), dense(ids), atol=1e-4)
    keys = set(model.state_dict())
    assert not any(k.startswith("head") for k in keys)
    assert {"embed.weight", "body.linear.weight", "body.linear.bias", "body.conv.weight"} <= keys
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_goes_out_and_in_bit_for_bit(kind: str) -> None:
    model, other = Tiny(), Tiny()
    store_(model, config_from(kind, {}), PATHS)
    for p in other.parameters():
        nn.init.normal_(p)
    store_(other, config_from(kind, {}), PATHS)
    other.load_state_dict(model.state_dict(), strict=True)
    ids = torch.arange(40)[None]
    assert torch.equal(model(ids), other(ids))


def test_a_state_dict_that_does_not_fit_is_refused() -> None:
    model = Tiny()
    store_(model, config_from("nf4", {}), ["body.linear"])
    state = model.state_dict()
    del state["body.linear.weight.quant_map"]
    with pytest.raises(RuntimeError, match="quant_map: missing"):
        model.load_state_dict(state)
    small = stored(nn.Linear(64, 32), config_from("nf4", {}))
    with pytest.raises(RuntimeError, match=r"weight is NF4 \(32, 64\), the layer has NF4 \(96, 64\)"):
        model.get_submodule("body.linear").load_state_dict(small.state_dict() | {"bias": torch.zeros(96)})


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = Tiny()
    model.body["conv"].weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"body\.conv\.weight: .* holds nan"):
        store_(model, config_from("nf4", {}), PATHS)
    assert type(model.embed) is nn.Embedding
    assert type(model.body["linear"]) is nn.Linear


def test_gradients_pass_through() -> None:
    model = Tiny()
    store_(model, config_from("nf4", {}), ["body.linear", "body.conv"])
    x = torch.randn(2, 64, requires_grad=True)
    model.body["linear"](x).sum().backward()
    dense = model.get_submodule("body.linear").dense(torch.float32)
    assert x.grad is not None
    assert torch.allclose(x.grad, dense.sum(0).expand(2, -1), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # in torch's own forward mode
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_in_forward_mode_and_by_torch_func(kind: str) -> None:
    kept = StoredLinear.of(layer := nn.Linear(64, 8), config_from(kind, {}))
    whole = kept.dense(torch.float32)
    x, t = torch.randn(2, 3, 64)
    tangent = torch.func.jvp(kept, (x,), (t,))[1]
    torch.testing.assert_close(tangent, t @ whole.T)
    gradient = torch.func.grad(lambda x: kept(x).square().sum())(x)
    torch.testing.assert_close(gradient, 2 * (x @ whole.T + layer.bias) @ whole)
    torch.testing.assert_close(torch.vmap(kept)(x), kept(x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # in torch's own forward mode
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # in torch's compiler
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_before_its_first_use_and_used_in_forward_mode(kind: str) -> None:
    kept = StoredLinear.of(nn.Linear(64, 8), config_from(kind, {}))
    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
    x, t = torch.randn(2, 3, 64)
    torch.testing.assert_close(compiled(x), kept(x))
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, t)))
    torch.testing.assert_close(y.tangent, t @ kept.dense(torch.float32).T)


def test_casting_a_model_leaves_its_storages_alone() -> None:
    model = Tiny()
    store_(model, config_from("nf4", {}), ["body.linear"])
    before = model.get_submodule("body.linear").dense(torch.float32)
    model.to(torch.bfloat16)
    layer = model.get_submodule("body.linear")
    assert torch.equal(layer.dense(torch.float32), before)
    assert layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16


def test_float16_rows_are_computed_in_float32() -> None:
    new = stored(nn.Linear(64, 8, bias=False), config_from("nf4", {}))
    x = torch.randn(2, 64)
    assert torch.allclose(new(x.half()).float(), new(x), atol=2e-2)
