"""The 4-bit format against bitsandbytes itself, against the oracle, and with files that are wrong."""

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import isa  # noqa: F401
from tests.oracles import fourbit as oracle
from tests.storage.cases import SHAPES, weight
from veneer.errors import ConfigError, ModelError
from veneer.kernels import native
from veneer.kernels.dynamic_quant import dynamic_map
from veneer.storage import STORAGES, config_from, from_tensors
from veneer.storage.fourbit import STATE, FourBit

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def bnb() -> Iterator[Any]:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    functional = pytest.importorskip("bitsandbytes.functional")
    yield functional


def their_dense(bnb: Any, codes: Tensor, state: Any, shape: tuple[int, int]) -> Tensor:
    """What bitsandbytes dequantizes to.

    Its AVX-512 kernel takes the wrong absmax where a row is no multiple of the block (seen in 0.50.2: it starts each
    row anew); one long row of the same numbers it reads right.
    """
    if shape[1] % state.blocksize:
        state.shape = torch.Size([1, shape[0] * shape[1]])
    dense: Tensor = bnb.dequantize_4bit(codes, state)
    return dense.view(shape)


def make(kind: str, w: Tensor, **settings: Any) -> FourBit:
    kept = STORAGES[kind].of(w, config_from(kind, settings))
    assert isinstance(kept, FourBit)
    return kept


def test_dynamic_map_is_rederived() -> None:
    got = dynamic_map().levels.tolist()
    assert got == pytest.approx(oracle.dynamic_map(), abs=1e-7)
    for at, value in {0: -0.992968738, 64: -0.098593749, 126: -5.5e-7, 127: 0, 128: 5.5e-7, 192: 0.12109375}.items():
        assert got[at] == pytest.approx(value, rel=1e-6)
    assert got[255] == 1.0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bit_identical_to_bitsandbytes(bnb: Any, isa: str, kind: str, dtype: torch.dtype) -> None:  # noqa: F811
    for shape in SHAPES:
        for block in (32, 64, 4096):
            w = weight(shape, dtype)
            codes, state = bnb.quantize_4bit(w, blocksize=block, quant_type=kind)
            kept = make(kind, w, block=block, double_quant=False)
            assert torch.equal(kept.codes, codes.view(-1)), (shape, block)
            assert torch.equal(kept.absmax, state.absmax), (shape, block)
            want = their_dense(bnb, codes, state, shape)
            assert torch.equal(kept.dense(dtype), want), (shape, block)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nested_statistics_decode_bit_exactly_both_ways(bnb: Any, isa: str, kind: str) -> None:  # noqa: F811
    for shape in SHAPES:
        w = weight(shape)
        codes, state = bnb.quantize_4bit(w, quant_type=kind, compress_statistics=True)
        theirs = {"w": codes} | {f"w.{k}": v for k, v in state.as_dict(packed=True).items()}
        read = from_tensors(theirs, "w")
        assert torch.equal(read.dense(torch.float32), their_dense(bnb, codes, state, shape))
        ours = make(kind, w)
        rest = {k.removeprefix("w."): v for k, v in ours.tensors("w").items() if k != "w"}
        back = bnb.QuantState.from_dict(rest, device=torch.device("cpu"))
        want = their_dense(bnb, ours.tensors("w")["w"], back, shape)
        assert torch.equal(ours.dense(torch.float32), want)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_is_written_is_what_bitsandbytes_writes(bnb: Any, kind: str, nested: bool) -> None:
    for dtype in FLOATS:
        w = weight((48, 576), dtype)
        codes, state = bnb.quantize_4bit(w, quant_type=kind, compress_statistics=nested)
        theirs = {"w": codes} | {f"w.{k}": v for k, v in state.as_dict(packed=True).items()}
        ours = make(kind, w, double_quant=nested).tensors("w")
        assert list(ours) == list(theirs)
        for key, want in theirs.items():
            assert ours[key].dtype == want.dtype, key
            assert ours[key].shape == want.shape, key
            if key == "w.absmax" and nested:  # theirs goes through a table of 65536 cells, ours to the nearest level
                values = dynamic_map().levels
                assert float((values[ours[key].int()] - values[want.int()]).abs().max()) < 0.02
            else:
                assert torch.equal(ours[key], want), key


def test_every_value_against_the_oracle() -> None:
    w = weight((5, 96))
    kept = make("nf4", w)
    absmax = oracle.decode_absmax(
        kept.absmax.tolist(), kept.nested_absmax, kept.nested_levels, kept.offset, kept.nested_block
    )
    want = oracle.dequantize(kept.codes.tolist(), absmax, kept.levels, kept.block, w.numel())
    assert kept.dense(torch.float32).view(-1).tolist() == want.tolist()


def test_size_in_bits() -> None:
    w = weight((256, 1024))
    assert 8 * make("nf4", w, double_quant=False).nbytes / w.numel() == pytest.approx(4.5, abs=0.01)
    tables = 4 * (16 + 256)
    assert 8 * (make("nf4", w).nbytes - tables) / w.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))


def test_blocks_other_than_powers_of_two_are_refused() -> None:
    with pytest.raises(ConfigError, match="nf4: block is 48, should be one of 32, 64, 128"):
        config_from("nf4", {"block": 48})


def test_a_weight_that_is_not_finite_is_named() -> None:
    w = weight((4, 64))
    w[2, 5] = float("nan")
    config = config_from("nf4", {})
    with pytest.raises(ModelError, match=r"layer\.weight: .* holds nan at position 133"):
        STORAGES["nf4"].of(w, config, "layer.weight")


# ---- files that are wrong


def test_numbers_whose_mean_overflows_are_refused() -> None:
    w = torch.full((4, 64), 3e38)
    with pytest.raises(ModelError, match="too large for double quantization; set double_quant to false"):
        make("nf4", w)
    assert torch.equal(make("nf4", w, double_quant=False).dense(torch.float32), w)


def test_a_wrong_instruction_set_is_no_fault_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ConfigError("VENEER_ISA=sse9 is not an instruction set")

    monkeypatch.setattr(native, "library", refuse)
    with pytest.raises(ConfigError, match=r"^VENEER_ISA=sse9"):
        make("nf4", torch.ones(2, 64))


def whole(nested: bool = True) -> dict[str, Tensor]:
    return make("nf4", weight((8, 96)), double_quant=nested).tensors("m.weight")


def state_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(bytes(tensors[f"m.weight.{STATE}nf4"].tolist()))
    return state


def with_state(tensors: dict[str, Tensor], text: str) -> None:
    tensors[f"m.weight.{STATE}nf4"] = torch.tensor(list(text.encode()), dtype=torch.uint8)


def changed(**values: Any) -> Callable[[dict[str, Tensor]], None]:
    return lambda t: with_state(t, json.dumps({**state_of(t), **values}))


def without(key: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda t: with_state(t, json.dumps({k: v for k, v in state_of(t).items() if k != key}))


def dropped(key: str) -> Callable[[dict[str, Tensor]], None]:
    def spoil(t: dict[str, Tensor]) -> None:
        del t[f"m.weight{key}"]

    return spoil


def put(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda t: t.update({f"m.weight{key}": value})


BAD: list[tuple[Callable[[dict[str, Tensor]], None], str]] = [
    (put("", torch.zeros(100, 1, dtype=torch.uint8)), "the codes hold 100 bytes, a weight of (8, 96) has 384"),
    (dropped(""), "the codes hold 0 bytes"),
    (put(".absmax", torch.zeros(11, dtype=torch.uint8)), "absmax is (11,) torch.uint8, should be (12,) torch.uint8"),
    (put(".absmax", torch.zeros(12)), "absmax is (12,) torch.float32, should be (12,) torch.uint8"),
    (dropped(".absmax"), "absmax: missing"),
    (dropped(".nested_quant_map"), "nested_quant_map: missing"),
    (dropped(".quant_map"), "quant_map: missing"),
    (put(".nested_absmax", torch.tensor([float("nan")])), "nested_absmax holds numbers that are not finite"),
    (put(".surprise", torch.zeros(1)), "surprise: not a key of this layout"),
    (
        put(f".{STATE}fp4", torch.zeros(2, dtype=torch.uint8)),
        "there should be one key quant_state.bitsandbytes__nf4",
    ),
    (dropped(f".{STATE}nf4"), "found none"),
    (lambda t: with_state(t, "{nonsense"), "is not JSON"),
    (lambda t: with_state(t, "[1]"), "should hold a JSON object, found list"),
    (lambda t: with_state(t, '{"blocksize": 64, "blocksize": 32}'), "blocksize occurs more than once"),
    (changed(quant_type="nf5"), "quant_type is 'nf5', should be 'nf4'"),
    (changed(blocksize=48), "blocksize is 48, should be one of 32, 64"),
    (changed(dtype="float64"), "dtype is 'float64', should be one of float32"),
    (changed(shape=[8]), "shape is [8], should be two positive numbers"),
    (changed(shape=[8, 97]), "a weight of (8, 97) has 388"),
    (changed(nested_offset=float("inf")), "nested_offset is inf, should be a finite number"),
    (changed(nested_blocksize=0), "nested_blocksize is 0, should be a positive number"),
    (changed(extra=1), "extra: not a key of the quantization state"),
    (changed(blocksize=64.0), "blocksize is 64.0, should be one of 32, 64"),
    (changed(dtype=["float16"]), "dtype is ['float16'], should be one of float32"),
    (changed(nested_offset=1e39), "nested_offset is 1e+39, should be a finite number of float32"),
    (changed(nested_offset=True), "nested_offset is True, should be a finite number"),
    (changed(nested_blocksize=1 << 40), "nested_blocksize is 1099511627776, should be a positive number"),
    (lambda t: with_state(t, "[" * 100_000), "is not JSON"),
    (put(f".{STATE}nf4", torch.zeros(2)), "is torch.float32, should be the bytes of JSON, torch.uint8"),
    (put(".absmax", torch.zeros(1, 12, dtype=torch.uint8)), "absmax is (1, 12) torch.uint8, should be (12,)"),
    (
        lambda t: t.update({f"m.weight.{STATE}nf5": t.pop(f"m.weight.{STATE}nf4")}),
        "there should be one key quant_state.bitsandbytes__nf4 or quant_state.bitsandbytes__fp4, "
        "found quant_state.bitsandbytes__nf5",
    ),
    (without("blocksize"), "blocksize: missing from the quantization state"),
    (without("nested_offset"), "nested_offset: missing from the quantization state"),
]


@pytest.mark.parametrize(("spoil", "words"), BAD, ids=[w[:40] for _, w in BAD])
def test_a_file_that_is_wrong_is_refused_by_name(spoil: Callable[[dict[str, Tensor]], None], words: str) -> None:
    tensors = whole()
    spoil(tensors)
    with pytest.raises(ModelError) as caught:
        STORAGES["nf4"].read(tensors, "m.weight")
    assert words in str(caught.value)
    assert str(caught.value).startswith("m.weight is not a complete 4-bit weight")
    assert str(caught.value).endswith("Nothing was loaded.")


def test_all_that_is_wrong_is_told_at_once() -> None:
    tensors = whole()
    dropped(".absmax")(tensors)
    put(".quant_map", torch.zeros(15))(tensors)
    with pytest.raises(ModelError, match="absmax: missing") as caught:
        from_tensors(tensors, "m.weight")
    assert "quant_map is (15,)" in str(caught.value)


def test_plain_statistics_with_nested_tensors_are_refused() -> None:
    tensors = whole(nested=False)
    put(".nested_absmax", torch.ones(1))(tensors)
    with pytest.raises(ModelError, match="nested_absmax: present, but the state is not nested"):
        from_tensors(tensors, "m.weight")


def test_codes_may_be_kept_as_another_number_type(bnb: Any) -> None:
    w = weight((8, 96))
    codes, state = bnb.quantize_4bit(w, quant_type="nf4", quant_storage=torch.bfloat16)
    read = from_tensors({"w": codes} | {f"w.{k}": v for k, v in state.as_dict(packed=True).items()}, "w")
    assert torch.equal(read.dense(torch.float32), their_dense(bnb, codes, state, (8, 96)))


def test_a_misaligned_map_is_copied_and_an_aligned_one_is_not() -> None:
    tensors = whole()
    raw = torch.zeros(tensors["m.weight.quant_map"].numel() * 4 + 1, dtype=torch.uint8)
    raw[1:] = tensors["m.weight.quant_map"].view(torch.uint8)
    assert raw.data_ptr() % 4 == 0
    tensors["m.weight.quant_map"] = torch.frombuffer(raw.numpy(), dtype=torch.float32, offset=1, count=16)
    read = STORAGES["nf4"].read(tensors, "m.weight")
    assert isinstance(read, FourBit)
    assert read.levels.data_ptr() % 4 == 0
    assert read.codes.data_ptr() == tensors["m.weight"].data_ptr()
    assert torch.equal(read.dense(torch.float32), make("nf4", weight((8, 96))).dense(torch.float32))
