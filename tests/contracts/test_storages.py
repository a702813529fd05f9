"""What every storage in the registry owes: a new one is found by itself and has to pass all of this."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.storage.cases import SHAPES, weight
from veneer.errors import ModelError
from veneer.storage import STORAGES, Storage, config_from, from_tensors

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=list(STORAGES))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def keep(kind: str, w: torch.Tensor) -> Storage:
    return STORAGES[kind].of(w, config_from(kind, {}))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_gives_back_the_same_weight(kind: str, shape: tuple[int, int]) -> None:
    for dtype in FLOATS:
        kept = keep(kind, weight(shape, dtype))
        tensors = kept.tensors("a.weight")
        assert "a.weight" in tensors
        assert all(k.startswith("a.") for k in tensors)
        back = from_tensors(tensors | {"b.weight": torch.ones(1)}, "a.weight")
        assert type(back) is STORAGES[kind]
        assert back.shape == shape
        assert torch.equal(back.dense(torch.float32), kept.dense(torch.float32))


@pytest.mark.parametrize("shape", SHAPES)
def test_products_rows_and_dense_agree(kind: str, shape: tuple[int, int]) -> None:
    kept = keep(kind, weight(shape))
    whole = kept.dense(torch.float32)
    assert whole.shape == shape
    x = torch.randn(2, 3, shape[1], requires_grad=True)
    y = kept.matmul(x)
    assert torch.allclose(y, F.linear(x, whole), atol=1e-4)
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    assert torch.allclose(dx, g @ whole, atol=1e-4)
    ids = torch.tensor([[0, shape[0] - 1]])
    assert torch.equal(kept.rows(ids, torch.float32), whole[ids])


def test_keeping_is_close_and_idempotent(kind: str) -> None:
    w = weight((48, 576))
    kept = keep(kind, w)
    first = kept.dense(torch.float32)
    assert float((first - w).norm() / w.norm()) < 0.13
    kept.put_(first)
    assert float((kept.dense(torch.float32) - first).norm() / first.norm()) < 0.02


def test_put_refuses_another_shape(kind: str) -> None:
    kept = keep(kind, weight((8, 64)))
    before = kept.dense(torch.float32)
    with pytest.raises((ModelError, RuntimeError)):
        kept.put_(weight((5, 96)))
    assert torch.equal(kept.dense(torch.float32), before)


def test_it_has_no_parameters_and_an_empty_state_dict_of_its_own(kind: str) -> None:
    kept = keep(kind, weight((8, 64)))
    assert list(kept.parameters()) == []
    assert not kept.state_dict()
    assert kept.nbytes == sum(t.nbytes for t in kept.buffers())


def test_it_is_copied_whole(kind: str) -> None:
    kept = keep(kind, weight((8, 64)))
    other = copy.deepcopy(kept)
    before = kept.dense(torch.float32)
    other.put_(torch.zeros(8, 64))
    assert torch.equal(kept.dense(torch.float32), before)
    assert torch.equal(kept.matmul(torch.eye(64)).T, kept.dense(torch.float32))
    assert not other.matmul(torch.eye(64)).any()


def test_no_matrix_is_refused(kind: str) -> None:
    for wrong in (torch.ones(4), torch.ones(2, 2, 2), torch.ones(0, 4), torch.ones(2, 2, dtype=torch.int32)):
        with pytest.raises(ModelError, match="is not a floating-point matrix"):
            keep(kind, wrong)
