"""How modules are seen as layers: kind, sizes, geometry, and the one dense weight."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.golden.toys import gpt2
from veneer.adapters.layer_view import dense_weight, frozen_layer, is_transposed, layer_at
from veneer.errors import NotFoldable
from veneer.methods.base import Geometry


@pytest.mark.parametrize(
    ("module", "kind", "d", "o", "transposed"),
    [
        (nn.Linear(3, 5), "linear", 3, 5, False),
        (Conv1D(5, 3), "linear", 3, 5, True),
        (nn.Embedding(7, 4), "embedding", 7, 4, True),
        (nn.Conv1d(2, 6, 3), "conv", 2, 6, False),
        (nn.Conv2d(2, 6, 3, groups=2), "conv", 2, 6, False),
        (nn.Conv3d(2, 6, 1), "conv", 2, 6, False),
    ],
)
def test_layers_are_seen_alike(module: nn.Module, kind: str, d: int, o: int, transposed: bool) -> None:
    layer = frozen_layer(module)
    assert layer is not None
    assert (layer.kind, layer.in_features, layer.out_features) == (kind, d, o)
    assert is_transposed(module) is transposed
    weight = layer.weight()
    assert weight.shape[0] == o
    assert weight.dtype == torch.float32
    assert not weight.requires_grad
    own = module.get_parameter("weight")
    assert torch.equal(weight, own.T if transposed else own)


@pytest.mark.parametrize("module", [nn.ConvTranspose1d(2, 2, 1), nn.Sequential(), nn.ReLU()])
def test_other_modules_are_no_layers(module: nn.Module) -> None:
    assert frozen_layer(module) is None


def test_a_weight_made_of_others_is_no_layer() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 1))
    assert isinstance(normed, nn.Conv1d)
    assert frozen_layer(normed) is None


def test_a_projection_that_is_never_called_is_no_layer() -> None:
    """nn.MultiheadAttention reads out_proj's weight itself, so a hook on it would never run."""
    assert frozen_layer(nn.MultiheadAttention(4, 2).out_proj) is None


def test_geometry() -> None:
    module = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 3), groups=2, padding_mode="circular")
    layer = frozen_layer(module)
    assert layer is not None
    assert layer.geometry == Geometry((3, 2), (2, 1), (1, 0), (1, 3), 2, "circular")
    same = frozen_layer(nn.Conv1d(1, 1, 3, padding="same"))
    assert same is not None
    assert same.geometry is not None
    assert same.geometry.padding == "same"


def test_biases_and_embedding_facts() -> None:
    linear, bare = frozen_layer(nn.Linear(2, 3)), frozen_layer(nn.Linear(2, 3, bias=False))
    assert linear is not None
    assert bare is not None
    assert linear.has_bias
    assert linear.bias is not None
    assert linear.bias().shape == (3,)
    assert not bare.has_bias
    assert bare.bias is None
    module = nn.Embedding(5, 2, padding_idx=3)
    module.embed_scale = torch.tensor(2.5)
    layer = frozen_layer(module)
    assert layer is not None
    assert (layer.padding_idx, layer.embed_scale) == (3, 2.5)


def test_half_precision_weights_are_given_as_float32() -> None:
    module = nn.Linear(2, 3).bfloat16()
    assert dense_weight(module).dtype == torch.float32


def test_a_storage_of_its_own_gives_its_dense_weight() -> None:
    class Packed(nn.Linear):
        def dense(self, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((3, 2), 7.0, dtype=dtype)

    assert torch.equal(dense_weight(Packed(2, 3)), torch.full((3, 2), 7.0))


def test_an_unknown_packed_weight_is_refused_by_name() -> None:
    module = nn.Linear(2, 3)
    module.weight = nn.Parameter(torch.zeros(3, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(NotFoldable, match=r"a Linear keeps its weight as torch\.uint8, in a layout not known here"):
        dense_weight(module)


def test_layer_at() -> None:
    assert layer_at(gpt2(), "transformer.h.0.attn.c_attn").out_features == 48
