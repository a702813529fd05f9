"""Bytes of the meta model, its files, and which blocks gradients pass through."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.plan.checked import checked
from veneer.base.load import load_model
from veneer.base.storage_config import base_storage
from veneer.disk.tensors import weight_files
from veneer.errors import ModelError
from veneer.plan.meta_model import TargetBlocks, base_bytes, files_to_load, largest_tensor, short_model, tensor_bytes
from veneer.recipe.settings import Recipe

Make = Callable[..., Recipe]


@pytest.mark.parametrize("storage", ["dense", "nf4", "int8"])
def test_bytes_of_the_base_are_those_of_the_loaded_model(storage: str, recipe: Make) -> None:
    wanted = recipe(**{"storage.name": storage})
    loaded = load_model(wanted.model, storage=base_storage(wanted.storage.model_dump()), dtype="float32").network
    meta = checked(wanted).meta
    tables = 14 * 1088 if storage == "nf4" else 0  # loaded weights share one pair of them
    assert tensor_bytes(loaded) <= tensor_bytes(meta.network) <= tensor_bytes(loaded) + tables
    found = base_bytes(meta)
    assert found["blocks"] + found["rest"] == tensor_bytes(meta.network)
    assert found["largest block"] * 2 == found["blocks"]


def test_a_network_without_blocks_cannot_be_estimated(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = checked(recipe()).meta
    monkeypatch.setitem(meta.__dict__, "blocks", {})
    with pytest.raises(ModelError, match="LlamaForCausalLM has no transformer blocks known to veneer"):
        base_bytes(meta)


def test_the_largest_tensor_is_read_beside_its_copy_in_another_dtype(recipe: Make) -> None:
    table = 384 * 32
    assert largest_tensor(checked(recipe()).meta) == 4 * table
    assert largest_tensor(checked(recipe(**{"train.dtype": "bfloat16"})).meta) == 4 * table + 2 * table


def test_weights_are_quantized_once(recipe: Make) -> None:
    dense, nf4 = checked(recipe()), checked(recipe(**{"storage.name": "nf4"}))
    files = weight_files(dense.meta.files)
    assert files_to_load(dense) == (files, False) and files_to_load(nf4) == (files, True)
    load_model(nf4.recipe.model, storage=nf4.storage)
    cached, to_quantize = files_to_load(nf4)
    assert not to_quantize and cached != files and all(f.is_file() for f in cached)
    (cached[0].parent / "config.json").write_text("{}")  # train will make it anew
    assert files_to_load(nf4) == (files, True)


@pytest.mark.parametrize(
    ("method", "changed", "inside", "outside", "first"),
    [
        ({"targets": r"model\.layers\.4\.mlp\.up_proj"}, {4}, ("mlp.up_proj",), (), 4),
        (
            {"targets": r".*(1\.self_attn\.q_proj|4\.self_attn\.[qv]_proj)"},
            {1, 4},
            ("self_attn.q_proj", "self_attn.v_proj"),
            (),
            1,
        ),
        ({"targets": ["lm_head"]}, set(), (), ("lm_head",), 5),
        ({"targets": r"lm_head|.*4\.mlp\.up_proj"}, {4}, ("mlp.up_proj",), ("lm_head",), 4),
        ({"targets": r".*embed_tokens|.*4\.mlp\.up_proj"}, {4}, ("mlp.up_proj",), ("model.embed_tokens",), 0),
    ],
    ids=str,
)
def test_gradients_end_at_the_first_block_with_a_target(
    method: dict[str, Any],
    changed: set[int],
    inside: tuple[str],
    outside: tuple[str],
    first: int,
    recipe: Make,
    made_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    deep = made_model(tmp_path / "deep", num_hidden_layers=5, tied=False)
    of = {"model": str(deep), "method": {"name": "lora", "rank": 2, **method}}
    found = TargetBlocks.of(checked(recipe(**of)))
    assert found == TargetBlocks(5, frozenset(changed), inside, outside, first)
    assert [found.targeted(i) for i in range(6)] == [i in changed or i == 5 for i in range(6)]
    assert TargetBlocks.of(checked(recipe(**of, prompt={"name": "prompt"}))).first == 0


def test_a_few_blocks_have_the_targets_of_all_or_only_the_first(
    recipe: Make, made_model: Callable[..., Path], tmp_path: Path
) -> None:
    deep = made_model(tmp_path / "deep", num_hidden_layers=5)
    made = checked(recipe(model=str(deep), method={"name": "lora", "targets": r".*\.4\.mlp\.(up|down)_proj"}))
    every = [f"model.layers.{i}.mlp.{leaf}_proj" for i in range(3) for leaf in ("up", "down")]
    assert list(short_model(made, 3)[1].deltas) == every
    assert list(short_model(made, 3, all_targeted=False)[1].deltas) == every[:2]
    assert all(not m._forward_hooks for m in made.meta.network.modules())  # the whole model stays as it is
