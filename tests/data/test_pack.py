from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.data.example import Example
from veneer.data.pack import collate, plan_batches
from veneer.errors import ConfigError, DataError

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200)


def example(tokens: list[int], supervised: list[int]) -> Example:
    mask = np.zeros(len(tokens), dtype=np.bool_)
    mask[supervised] = True
    return Example(np.array(tokens, dtype=np.int32), mask, "x", 1)


@given(LENGTHS, st.integers(1, 500), st.integers(64, 256), st.integers(-5, 2**70), st.integers(0, 9), st.booleans())
def test_each_example_exactly_once_within_the_limits(
    lengths: list[int], per_step: int, most: int, seed: int, epoch: int, packing: bool
) -> None:
    plan = plan_batches(
        lengths,
        max_length=64,
        tokens_per_step=per_step,
        micro_batch_tokens=most,
        seed=seed,
        epoch=epoch,
        packing=packing,
    )
    assert sorted(i for step in plan for micro in step for i in micro) == list(range(len(lengths)))
    sizes = [[sum(lengths[i] for i in micro) for micro in step] for step in plan]
    assert all(size <= most for step in sizes for size in step)
    for step, micros in zip(plan, sizes, strict=True):
        assert sum(micros) < per_step + 64  # never a whole document too many
        if packing and len(micros) > 1:  # few and even: two neighbors would not have fit into one, on the whole
            assert len(micros) <= 2 * sum(micros) / most + 1
            flat = [lengths[i] for micro in step for i in micro]
            assert flat == sorted(flat, reverse=True)
    for step in sizes[:-1]:
        assert abs(sum(step) - per_step) <= max(32, max(lengths)) or sum(step) >= per_step


def test_steps_come_as_close_as_a_document_allows() -> None:
    lengths = np.random.default_rng(0).integers(10, 100, 2000).tolist()
    plan = plan_batches(lengths, max_length=100, tokens_per_step=1000, seed=0, epoch=0)
    totals = [sum(lengths[i] for micro in step for i in micro) for step in plan]
    assert all(abs(t - 1000) <= 50 for t in totals[:-1])
    assert abs(np.mean(totals[:-1]) - 1000) < 5


def test_the_plan_depends_on_seed_and_epoch_and_nothing_else() -> None:
    lengths = list(range(1, 60))

    def plan(seed: int, epoch: int) -> list[list[list[int]]]:
        return plan_batches(lengths, max_length=64, tokens_per_step=128, seed=seed, epoch=epoch)

    assert plan(3, 1) == plan(3, 1)
    np.random.seed(1)  # global state has no say
    assert plan(3, 1) == plan(3, 1)
    assert len({str(plan(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def test_the_shuffle_is_numpys_pcg64_of_seed_and_epoch() -> None:
    order = np.random.Generator(np.random.PCG64([7, 2])).permutation(20).tolist()
    plan = plan_batches([1] * 20, max_length=4, tokens_per_step=1, seed=7, epoch=2, packing=False)
    assert [i for step in plan for micro in step for i in micro] == order


def test_without_packing_the_steps_are_the_same() -> None:
    lengths = np.random.default_rng(1).integers(1, 64, 300).tolist()
    args = {"max_length": 64, "tokens_per_step": 400, "seed": 5, "epoch": 0}
    packed, single = (plan_batches(lengths, **args, packing=p) for p in (True, False))  # type: ignore[arg-type]
    flat = [[sorted(i for micro in step for i in micro) for step in plan] for plan in (packed, single)]
    assert flat[0] == flat[1]
    assert all(len(micro) == 1 for step in single for micro in step)


def test_micro_batches_are_even() -> None:
    plan = plan_batches([10] * 90, max_length=10, tokens_per_step=900, micro_batch_tokens=400, seed=0, epoch=0)
    assert [len(micro) for micro in plan[0]] == [30, 30, 30]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(30, 60))
def test_micro_batches_are_the_fewest_and_then_the_most_even(lengths: list[int], most: int) -> None:
    plan = plan_batches(lengths, max_length=30, tokens_per_step=10**6, micro_batch_tokens=most, seed=0, epoch=0)
    made = [sum(lengths[i] for i in micro) for micro in plan[0]]
    falling = sorted(lengths, reverse=True)
    ways = []  # every way to cut the documents, sorted by length, into runs
    for cuts in product([False, True], repeat=len(falling) - 1):
        sums = [falling[0]]
        for cut, length in zip(cuts, falling[1:], strict=True):
            sums = [*sums, length] if cut else [*sums[:-1], sums[-1] + length]
        ways.append(sums)
    allowed = [sums for sums in ways if max(sums) <= most]
    assert (len(made), max(made)) == min((len(sums), max(sums)) for sums in allowed)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match="example 1 has 65 tokens, outside 1 to max_length = 64"):
        plan_batches([1, 65], max_length=64, tokens_per_step=10, seed=0, epoch=0)
    with pytest.raises(ConfigError, match="tokens_per_step and micro_batch_tokens must be at least 1, got 0 and 2048"):
        plan_batches([1], max_length=64, tokens_per_step=0, seed=0, epoch=0)


@st.composite
def documents(draw: st.DrawFn) -> list[Example]:
    made = []
    for _ in range(draw(st.integers(1, 5))):
        tokens = draw(st.lists(st.integers(0, 50), min_size=1, max_size=12))
        made.append(example(tokens, draw(st.lists(st.integers(0, len(tokens) - 1), max_size=12))))
    return made


@given(documents())
def test_collate_says_what_one_document_at_a_time_says(examples: list[Example]) -> None:
    batch = collate(examples)
    ids, positions, targets = [], [], []
    for number, one in enumerate(examples):
        for at, token in enumerate(one.tokens.tolist()):
            if at and one.supervised[at]:
                targets.append((len(ids) - 1, token, number))
            ids.append(token)
            positions.append(at)
    assert batch.input_ids.tolist() == [ids]
    assert batch.position_ids.tolist() == [positions]
    assert batch.starts.tolist() == np.cumsum([0, *map(len, examples)]).tolist()
    assert list(zip(batch.supervised.tolist(), batch.targets.tolist(), strict=True)) == [t[:2] for t in targets]
    lasts = {end - 1 for _, end in pairwise(batch.starts.tolist())}
    assert not lasts & set(batch.supervised.tolist())  # no document predicts the next one's first token
