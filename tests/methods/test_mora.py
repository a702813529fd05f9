"""MoRA against its paper's maps, its authors' folder layout, and itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from tests.methods.layers import delta_on, folded, gradients_hold, layer_of, linear, moved, rows, through
from tests.oracles import mora as oracle
from veneer.adapters.attach import attach, load_adapter
from veneer.errors import AdapterMismatch, ConfigError, TargetError
from veneer.methods.mora import MoRA, MoRAConfig, side_of
from veneer.methods.restartable import refuse_restarts

KINDS: list[dict[str, Any]] = [
    {"variant": "truncation"},
    {"variant": "decoupling"},
    {"variant": "rotation"},
    *({"variant": "sharing", "grouping": n} for n in (1, 2, 3, 4)),
]
SHAPES = [(24, 24), (32, 16), (16, 32), (23, 17), (17, 23), (40, 13), (13, 40)]
"""Inputs and outputs: square, wide, tall, and with remainders on either side."""

M = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
GOLDEN = {
    (1, 5, 3): [[3, 2, 1], [7, 4, 3], [3, 2, 1], [7, 4, 3], [3, 2, 1]],
    (1, 3, 5): [[3, 2, 1, 2, 1], [7, 4, 3, 4, 3], [3, 2, 1, 2, 1]],
    (2, 5, 3): [[1, 1, 2], [1, 1, 2], [1, 1, 2], [3, 3, 4], [3, 3, 4]],
    (2, 3, 5): [[1, 1, 1, 2, 2], [1, 1, 1, 2, 2], [3, 3, 3, 4, 4]],
    (3, 5, 3): [[1, 1, 2], [3, 3, 4], [1, 1, 2], [3, 3, 4], [1, 1, 2]],
    (3, 3, 5): [[1, 1, 1, 2, 2], [3, 3, 3, 4, 4], [1, 1, 1, 2, 2]],
    (4, 5, 3): [[3, 2, 1], [3, 2, 1], [3, 2, 1], [7, 4, 3], [7, 4, 3]],
    (4, 3, 5): [[3, 2, 1, 2, 1], [3, 2, 1, 2, 1], [7, 4, 3, 4, 3]],
    (6, 5, 3): [[1, 2, 0], [3, 4, 0], [0.239134, 0, 2.223244], [-0.363204, 0, 4.986791], [1, 2, 0]],
    (6, 3, 5): [[1, 2, 0, 0, 0], [3, 4, 0, 0, 0], [0, 0, 2.223244, 0.239134, 0]],
}
"""Updates (rows are outputs) the authors' code makes of M, by its mora_type, outputs and inputs."""


def with_side(d: int, o: int, side: int, **settings: Any) -> Any:
    """A delta of rank 1 whose matrix is replaced by one of another side, to meet small golden vectors."""
    delta = delta_on(linear(d, o, bias=False), MoRAConfig(rank=1, **settings))
    assert delta.side == side, "sqrt(5 + 3) and its rounding give 3, or 2 for rotation"
    return delta


@pytest.mark.parametrize(("kind", "o", "d"), GOLDEN)
def test_the_published_updates(kind: int, o: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.methods.mora.side_of", lambda *_: 2)
    settings = {"variant": "rotation"} if kind == 6 else {"variant": "sharing", "grouping": kind}
    delta = with_side(d, o, 2, **settings)
    delta.m.data.copy_(M)
    want = torch.tensor(GOLDEN[kind, o, d], dtype=torch.float32)
    assert torch.allclose(delta.fold(torch.zeros(o, d)), want, atol=2e-6)
    assert torch.allclose(delta(torch.eye(d), torch.zeros(d, o)).T, want, atol=2e-6)


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize(("d", "o"), SHAPES)
def test_fold_and_forward_are_the_papers_maps(settings: dict[str, Any], d: int, o: int) -> None:
    module = linear(d, o)
    delta = moved(delta_on(module, MoRAConfig(rank=2, **settings)))
    assert delta.side == oracle.r_hat(d, o, 2, settings["variant"] == "rotation")
    want = oracle.update(m=delta.m.detach().numpy().astype(np.float64), d_out=o, d_in=d, **settings)
    w = layer_of(module).weight()
    assert np.abs((delta.fold(w) - w).detach().numpy() - want).max() < 1e-5
    x = rows(2, 3, d)
    plain = module(x)
    assert np.abs((through(module, delta, x) - plain).detach().numpy() - x.numpy() @ want.T).max() < 2e-5
    assert torch.allclose(folded(module, delta, x), through(module, delta, x), atol=2e-5)


@pytest.mark.parametrize("grouping", [1, 2, 3, 4])
def test_rounding_and_maps_at_full_size(grouping: int) -> None:
    d, o = 11008, 4096
    delta = moved(delta_on(linear(d, o, bias=False), MoRAConfig(rank=8, variant="sharing", grouping=grouping)))
    assert delta.m.shape == (348, 348)  # 347.58...; rounding down, as the paper writes it, would give 347
    c = oracle.strided_sum(d, 348) if grouping in (1, 4) else oracle.adjacent(d, 348)
    e = oracle.strided_copy(o, 348) if grouping in (1, 3) else oracle.adjacent(o, 348).T
    some = np.array([0, 1, 347, 348, 2000, o - 1])
    want = e[some] @ delta.m.detach().numpy().astype(np.float64) @ c
    assert np.abs(delta.fold(torch.zeros(1, 1).expand(o, d))[some].detach().numpy() - want).max() < 1e-5


@pytest.mark.parametrize(
    ("d", "o", "rank", "side", "even"),
    [(4096, 4096, 8, 256, 256), (4096, 11008, 256, 1966, 1966), (768, 768, 128, 443, 442), (768, 2560, 128, 653, 652)],
)
def test_the_authors_rounding(d: int, o: int, rank: int, side: int, even: int) -> None:
    assert side_of(d, o, MoRAConfig(rank=rank, variant="sharing")) == side
    assert side_of(d, o, MoRAConfig(rank=rank, variant="rotation")) == even


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_gradients(settings: dict[str, Any]) -> None:
    module = linear(7, 10)
    assert gradients_hold(lambda: (module, moved(delta_on(module, MoRAConfig(rank=1, **settings)))), rows(2, 7))


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_a_new_delta_changes_nothing_but_learns_at_once(settings: dict[str, Any]) -> None:
    module = linear(17, 23)
    delta, x = delta_on(module, MoRAConfig(rank=2, **settings)), rows(4, 17)
    assert torch.equal(through(module, delta, x), module(x))
    through(module, delta, x).square().sum().backward()
    assert torch.count_nonzero(delta.m.grad) > delta.m.numel() // 2


@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_work_is_that_of_the_square_matrix(settings: dict[str, Any]) -> None:
    module = linear(96, 64)
    delta = delta_on(module, MoRAConfig(rank=2, **settings))
    with FlopCounterMode(display=False) as counter:
        delta(rows(5, 96), torch.zeros(5, 64))
    pieces = -(-64 // delta.side) if settings["variant"] in ("rotation", "decoupling") else 1
    assert counter.get_total_flops() == 5 * 2 * delta.side**2 * pieces


def test_size() -> None:
    for settings in KINDS:
        config = MoRAConfig(rank=3, **settings)
        delta = delta_on(linear(31, 18), config)
        assert sum(p.numel() for p in delta.parameters()) == MoRA.n_params(layer_of(linear(31, 18)), config)


def test_dropout_only_while_training() -> None:
    module = linear(32, 32)
    delta, x = moved(delta_on(module, MoRAConfig(rank=2, variant="sharing", dropout=0.5))), rows(2, 32)
    assert not torch.equal(through(module, delta, x), through(module, delta, x))
    assert torch.equal(through(module, delta.eval(), x), through(module, delta, x))


@pytest.mark.parametrize(("groupings", "seen"), [(4, [2, 3, 4, 1]), (2, [2, 1, 2, 1]), (1, [1, 1, 1, 1])])
def test_restarts_move_the_grouping_on(groupings: Any, seen: list[int]) -> None:
    delta = delta_on(linear(24, 18), MoRAConfig(rank=2, variant="sharing", groupings=groupings))
    was = []
    for _ in seen:
        moved(delta).restart_(torch.Generator())
        assert torch.count_nonzero(delta.m) == 0
        was.append(delta.grouping)
    assert was == seen


def test_a_checkpoint_keeps_the_grouping() -> None:
    """All of a delta's state is in its parameters and buffers."""
    config = MoRAConfig(rank=2, variant="sharing")
    delta, other = delta_on(linear(24, 18), config), delta_on(linear(24, 18), config)
    delta.restart_(torch.Generator())
    moved(delta)
    other.load_state_dict(delta.state_dict())
    assert other.grouping == 2
    assert torch.equal(other.fold(torch.zeros(18, 24)), delta.fold(torch.zeros(18, 24)))


def test_regrouping_is_what_raises_the_rank_of_the_sum() -> None:
    def rank_after(groupings: Any) -> int:
        delta = delta_on(linear(64, 64), MoRAConfig(rank=1, variant="sharing", groupings=groupings))
        total = torch.zeros(64, 64)
        for seed in range(3):
            total = moved(delta, seed=seed).fold(total).detach()
            delta.restart_(torch.Generator())
        return int(torch.linalg.matrix_rank(total))

    side = side_of(64, 64, MoRAConfig(rank=1, variant="sharing"))
    assert rank_after(1) == side
    assert rank_after(2) >= 2 * side - 1  # both groupings know the plain sum of everything


def after_cycles(module: torch.nn.Module, cycles: int, **settings: Any) -> tuple[Any, list[tuple[int, Any]]]:
    """A delta in its last cycle, and each cycle's grouping and square."""
    delta = delta_on(module, MoRAConfig(rank=2, variant="sharing", **settings))
    squares = []
    for seed in range(cycles):
        if seed:
            delta.remember_()
            delta.restart_(torch.Generator())
        moved(delta, seed=seed)
        squares.append((delta.grouping, delta.m.detach().double().numpy()))
    return delta, squares


@pytest.mark.parametrize(("groupings", "cycles"), [(4, 3), (4, 6), (2, 5), (1, 3)])
@pytest.mark.parametrize(("d", "o"), [(24, 24), (23, 17), (13, 40)])
def test_cycles_add_up_exactly(d: int, o: int, groupings: Any, cycles: int) -> None:
    module, x = linear(d, o), rows(5, d)
    delta, squares = after_cycles(module, cycles, groupings=groupings)
    assert len(delta.tensors()) == (2 if groupings == 1 else min(groupings, cycles))
    want = sum(oracle.sharing(m, o, d, grouping) for grouping, m in squares)
    past = sum(oracle.sharing(m, o, d, grouping) for grouping, m in squares[:-1])
    zero = torch.zeros(o, d, dtype=torch.float64)
    assert np.abs(delta.fold(zero).detach().numpy() - want).max() < 1e-5
    assert np.abs(delta.fold_past(zero).numpy() - past).max() < 1e-5
    a, b = (t.double().numpy() for t in delta.factors())
    assert np.abs(b @ a - want).max() < 1e-5
    y = module(x)
    assert np.abs((delta(x, y) - y).detach().numpy() - x.numpy() @ want.T).max() < 5e-5
    delta.past_in_weight = True
    assert np.abs((delta(x, y) - y).detach().numpy() - x.numpy() @ (want - past).T).max() < 5e-5


def test_finished_cycles_see_no_dropout() -> None:
    module, x = linear(24, 18), rows(4, 24)
    delta, _ = after_cycles(module, 3, dropout=0.5)
    delta.m.data.zero_()
    assert torch.equal(delta.train()(x, module(x)), delta.eval()(x, module(x)))


@pytest.mark.parametrize(("n", "rank"), [(64, 28), (66, 30)])
def test_the_rank_of_two_cycles_is_above_that_of_the_square(n: int, rank: int) -> None:
    """As far as the groupings differ: of 64 = 16 * 4 indices, 4 sums are known to strided and adjacent groups alike."""
    delta, _ = after_cycles(linear(n, n), 2)
    assert delta.side == 16 < rank
    inputs = np.concatenate([oracle.strided_sum(n, 16), oracle.adjacent(n, 16)])
    outputs = np.concatenate([oracle.strided_copy(n, 16).T, oracle.adjacent(n, 16)])
    assert min(np.linalg.matrix_rank(inputs), np.linalg.matrix_rank(outputs)) == rank
    assert int(torch.linalg.matrix_rank(delta.fold(torch.zeros(n, n, dtype=torch.float64)))) == rank


@pytest.mark.parametrize("settings", [{"variant": v} for v in ("truncation", "decoupling", "rotation")], ids=str)
def test_restarts_that_cannot_regroup_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"mora.variant {settings['variant']} gains nothing from restarts"):
        refuse_restarts(MoRAConfig(**settings))
    with pytest.raises(ConfigError, match=r"mora\.groupings 1 gains nothing from restarts"):
        refuse_restarts(MoRAConfig(variant="sharing", groupings=1))
    delta = moved(delta_on(linear(24, 18), MoRAConfig(rank=2, **settings)))  # asked for all the same, it is right
    once = delta.fold(torch.zeros(18, 24)).detach()
    delta.remember_()
    delta.restart_(torch.Generator())
    assert torch.equal(delta.fold(torch.zeros(18, 24)), once)
    assert torch.allclose(delta(torch.eye(24), torch.zeros(24, 18)).T, once, atol=1e-6)
    assert torch.equal(delta.tensors()["lora_A.weight"], delta.past["m1"])


def test_rotation_reaches_full_rank() -> None:
    delta = moved(delta_on(linear(48, 48), MoRAConfig(rank=1, variant="rotation")))
    assert int(torch.linalg.matrix_rank(delta.fold(torch.zeros(48, 48)))) == 48 > delta.side


class TestFolders:
    """The layout of the authors' fork of PEFT: M under both of LoRA's names, r the LoRA rank."""

    def toy(self) -> torch.nn.Module:
        return torch.nn.Sequential(linear(24, 16, seed=3), linear(16, 24, seed=4))

    @pytest.mark.parametrize(
        ("settings", "kind"), list(zip(KINDS, ["truncation", "decoupling", 6, 1, 2, 3, 4], strict=True))
    )
    def test_written_and_read_again(self, tmp_path: Path, settings: dict[str, Any], kind: Any) -> None:
        model, x = self.toy(), rows(3, 24)
        adapter = attach(model, MoRAConfig(rank=2, rank_pattern={"1": 1}, **settings), ("0", "1"))
        for delta in adapter.deltas.values():
            moved(delta)
        want = model(x)
        adapter.save(tmp_path / "a")
        fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        assert (fields["use_mora"], fields["mora_type"], fields["r"]) == (True, kind, 2)
        tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert sorted(tensors) == [f"base_model.model.{n}.lora_{f}.weight" for n in (0, 1) for f in "AB"]
        first = tensors["base_model.model.0.lora_A.weight"]
        assert first.shape == (side_of(24, 16, MoRAConfig(rank=2, **settings)),) * 2
        assert torch.equal(first, tensors["base_model.model.0.lora_B.weight"])
        adapter.detach()
        loaded = load_adapter(model, tmp_path / "a")
        assert loaded.settings == adapter.settings
        assert torch.equal(model(x), want)

    def test_a_restarted_adapter_names_its_present_grouping(self, tmp_path: Path) -> None:
        model, x = self.toy(), rows(3, 24)
        adapter = attach(model, MoRAConfig(rank=2, variant="sharing"), ("0", "1"))
        for delta in adapter.deltas.values():
            delta.restart_(torch.Generator())
            moved(delta)
        want = model(x)
        adapter.save(tmp_path / "a")
        assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["mora_type"] == 2
        adapter.detach()
        load_adapter(model, tmp_path / "a")
        assert torch.equal(model(x), want)

    @pytest.mark.parametrize("cycles", [2, 4, 6])
    def test_several_groupings_have_a_square_each(self, tmp_path: Path, cycles: int) -> None:
        model, x = self.toy(), rows(3, 24)
        adapter = attach(model, MoRAConfig(rank=2, variant="sharing", rank_pattern={"1": 1}), ("0", "1"))
        for cycle in range(cycles):
            for delta in adapter.deltas.values():
                if cycle:
                    delta.remember_()
                    delta.restart_(torch.Generator())
                moved(delta, 0.1, seed=cycle)
        want = model(x)
        adapter.save(tmp_path / "a")
        fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        number, others = {2: (2, [1]), 4: (4, [1, 2, 3]), 6: (2, [1, 3, 4])}[cycles]
        assert (fields["peft_type"], fields["mora_type"], fields["mora_finished_types"]) == ("REMORA", number, others)
        tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
        groupings = sorted([number, *others])
        assert sorted(tensors) == [f"base_model.model.{i}.mora_{n}.weight" for i in (0, 1) for n in groupings]
        with pytest.raises(KeyError, match="REMORA"):
            PeftConfig.from_pretrained(tmp_path / "a")
        adapter.detach()
        loaded = load_adapter(model, tmp_path / "a")
        assert torch.allclose(model(x), want, atol=1e-6)
        loaded.save(tmp_path / "again")
        for file in (tmp_path / "a").iterdir():
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
        for path, delta in loaded.deltas.items():
            assert all(torch.equal(t, tensors[f"base_model.model.{path}.{k}"]) for k, t in delta.tensors().items())

    def test_a_square_that_is_missing_or_not_named(self, tmp_path: Path) -> None:
        delta, _ = after_cycles(linear(24, 16), 3)
        config = delta.now(MoRAConfig(rank=2, variant="sharing"))
        fresh = delta_on(linear(24, 16), config)
        tensors = {k: t.detach().clone() for k, t in delta.tensors().items()}
        fresh.load_(tensors)
        with pytest.raises(AdapterMismatch, match=r"mora_2\.weight: in the model, not in the adapter"):
            fresh.load_({k: t for k, t in tensors.items() if k != "mora_2.weight"})
        with pytest.raises(AdapterMismatch, match=r"mora_4\.weight: in the adapter, not in the model"):
            fresh.load_({**tensors, "mora_4.weight": tensors["mora_2.weight"]})
        fields = MoRA.to_peft(config)
        assert MoRA.from_peft(fields) == config
        for wrong in ([3], [2, 1], [1, 1], [5], None):
            with pytest.raises(ConfigError, match=r"mora"):
                MoRA.from_peft({**fields, "mora_finished_types": wrong})
        with pytest.raises(ConfigError, match=r"squares of groupings .* of variant rotation"):
            MoRA.from_peft({**fields, "mora_type": 6})

    @pytest.mark.parametrize("kind", [1, 2, 3, 4, 6])
    def test_a_folder_of_the_fork(self, tmp_path: Path, kind: int) -> None:
        folder = tmp_path / "fork"
        folder.mkdir()
        d, o, r = 24, 16, 2
        side = oracle.r_hat(d, o, r, kind == 6)
        m = rows(side, side)
        save_file(
            {f"base_model.model.0.lora_{f}.weight": m.clone() for f in "AB"}, folder / "adapter_model.safetensors"
        )
        fields = {"peft_type": "LORA", "use_mora": True, "mora_type": kind, "r": r, "lora_alpha": 16, "bias": "none"}
        fields |= {"target_modules": ["0"], "lora_dropout": 0.05, "inference_mode": True, "use_dora": False}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        adapter = load_adapter(self.toy(), folder)
        variant = {"variant": "rotation"} if kind == 6 else {"variant": "sharing", "grouping": kind}
        want = oracle.update(m=m.numpy().astype(np.float64), d_out=o, d_in=d, **variant)
        assert np.abs(adapter.deltas["0"].fold(torch.zeros(o, d)).detach().numpy() - want).max() < 1e-5

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"mora_type": 5}, "mora_type 5; known: 1, 2, 3, 4, 6, truncation, decoupling"),
            ({"bias": "all"}, "uses bias, which veneer does not read"),
            ({"use_dora": True}, "uses use_dora"),
        ],
    )
    def test_refused_settings(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(AdapterMismatch, match=message):
            MoRA.from_peft({"peft_type": "LORA", "use_mora": True, "r": 4, **change})

    def test_factors_that_differ_are_no_mora(self) -> None:
        delta = delta_on(linear(8, 8), MoRAConfig(rank=1, variant="sharing"))
        side = delta.side
        with pytest.raises(AdapterMismatch, match=r"lora_A\.weight: differs from lora_B\.weight"):
            delta.load_({"lora_A.weight": torch.zeros(side, side), "lora_B.weight": torch.ones(side, side)})
        with pytest.raises(AdapterMismatch, match=r"lora_A\.weight: adapter has \(3, 3\), model needs \(4, 4\)"):
            delta.load_({"lora_A.weight": torch.zeros(3, 3), "lora_B.weight": torch.zeros(3, 3)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"mora: rank must be at least 1, got 0"),
        ({"rank_pattern": {"q": 0}}, r"mora: rank_pattern\['q'\] must be at least 1, got 0"),
        ({"variant": "rope"}, "mora.variant must be one of truncation, sharing, decoupling, rotation, got 'rope'"),
        ({"variant": "sharing", "grouping": 6}, "mora.grouping must be one of 1, 2, 3, 4, got 6"),
        ({"variant": "rotation", "grouping": 2}, "belong to variant sharing, not to rotation"),
        ({"variant": "sharing", "grouping": 3, "groupings": 2}, "grouping 3 is not among the first 2"),
        ({"dropout": 1.0}, r"mora.dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoRAConfig(**settings)


def test_a_matrix_wider_than_the_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"side 16 for a layer with 24 inputs and 8 outputs.*at most rank 2 for it"):
        delta_on(linear(24, 8), MoRAConfig(rank=8, variant="sharing"))
    with pytest.raises(ConfigError, match="no rank fits it: exclude it"):
        delta_on(linear(64, 2), MoRAConfig(rank=4, variant="sharing"))


def test_an_embedding_is_refused_before_anything_changes() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(30, 8), linear(8, 8))
    with pytest.raises(
        TargetError, match="method mora changes layers of kind linear only, but:\n  0 is a layer of kind embedding"
    ):
        attach(model, MoRAConfig(rank=1), ("0", "1"))
    assert not any(m._forward_hooks for m in model.modules())
