"""bitsandbytes' kernels behind the storage: what ours give, and what they cannot do refused.  On CUDA: not run."""

from typing import Any

import pytest
import torch

from tests.storage.cases import weight
from veneer.errors import ConfigError, ModelError
from veneer.storage import STORAGES, bnb, config_from
from veneer.storage.fourbit import FourBit


def made(shape: tuple[int, int] = (48, 128), name: str = "nf4", **settings: Any) -> FourBit:
    kept: Any = STORAGES[name].of(weight(shape), config_from(name, settings))
    return kept


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("settings", [{}, {"double_quant": False}, {"block": 128}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_what_the_dequantized_weight_does(name: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    kept = made(name=name, **settings)
    kept.compute_with("bitsandbytes")
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    dense = kept.dense(dtype)
    y = kept.matmul(x)
    assert y.dtype == dtype
    exact = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    want = x.detach().float() @ dense.float().T
    assert float((y.float() - want).norm()) <= exact * float(want.norm())
    with torch.no_grad():
        assert float((kept.matmul(x).float() - want).norm()) <= exact * float(want.norm())
        assert float((kept.matmul(x[:1, :1]).float() - want[:1, :1]).norm()) <= exact * float(want[:1, :1].norm())
    y.float().square().mean().backward()
    assert x.grad is not None
    want = (y.detach().float() * 2 / y.numel()) @ dense.float()
    assert float((x.grad.float() - want).norm()) <= 2 * exact * float(want.norm())


def test_the_choice_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(bnb, "matmul", lambda x, *_: asked.append("bitsandbytes") or x)
    kept, x = made(), torch.ones(1, 128)
    kept.matmul(x)
    kept.compute_with("veneer")
    kept.matmul(x)
    assert asked == []
    kept.compute_with("bitsandbytes")
    kept.matmul(x)
    assert asked == ["bitsandbytes"]


def test_what_it_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = made((64, 96))
    with pytest.raises(ModelError, match=r"layers\.0: its rows of 96 are not a multiple of the block of 64, which"):
        kept.compute_with("bitsandbytes", "layers.0")
    assert kept.backend == "auto"
    other = made()
    other.nested_block = 128
    other.moved()
    with pytest.raises(ModelError, match="its absmax are quantized in blocks of 128, bitsandbytes' kernels take 256"):
        other.compute_with("bitsandbytes")
    monkeypatch.setattr(bnb, "installed", lambda: False)
    with pytest.raises(ConfigError, match=r"bitsandbytes, which is not installed; run pip install"):
        made().compute_with("bitsandbytes")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="its kernel for AVX-512 is the wrong one"
)
@pytest.mark.parametrize("block", [32, 64, 512, 1024, 2048])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_what_it_misreads_is_known(name: str, block: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    d_of = (16, 32, 33, 48, 64, 96, 100, 128, 160, 192, 576, 1000, 1536, 3072)
    wrong, right = set(), set()
    for shape in [(o, d) for o in (1, 2, 7, 8) for d in d_of]:
        kept = made(shape, name, block=block, double_quant=False)
        state = bnb._state(torch.float32, kept._packed, shape, name)
        with torch.compiler.set_stance("force_eager"):  # or it compiles its other path anew for each shape
            theirs = functional.dequantize_4bit(kept.codes.view(-1, 1), state)
        (right if torch.equal(theirs, kept.dense(torch.float32)) else wrong).add(shape)
    assert wrong == {shape for shape in wrong | right if bnb.misread_on_cpu(shape, block)}
    assert bool(wrong) == (block < 2048)
