"""Pieces, packing and the plan: every row once, and no cutting of a step changes it."""

from collections import Counter

import numpy as np
import pytest
import torch

from data.batch_plan import BatchPlan
from data.datasets import make_loader
from data.packing import best_fit, in_order
from data.token_store import TokenStore, write_store
from data.tokenizing import Encoded
from rwkv.errors import InputError


def make_store(folder, lengths, *, dialogue=False, masks=None) -> TokenStore:
    """Records whose tokens are all different: record after record 1, 2, 3, ..."""
    lengths = np.array(lengths)
    mask = np.ones(lengths.sum(), bool) if masks is None else np.concatenate(masks)
    mask[np.cumsum(lengths) - lengths] = False
    tokens = np.arange(1, lengths.sum() + 1).astype(np.uint16)
    kind = np.full(len(lengths), dialogue)
    write_store(folder, [Encoded(tokens, mask, lengths, kind, Counter())], {"sources": []})
    return TokenStore([folder])


@pytest.fixture
def store(tmp_path):
    lengths = np.random.default_rng(0).integers(2, 40, size=203)
    return make_store(tmp_path / "s", lengths)


def scored_targets(batches) -> Counter:
    return Counter(t for batch in batches for t in batch.targets[batch.mask].tolist())


def all_targets(store) -> Counter:
    return Counter(
        int(t) for i in range(len(store)) for t in store.record(i)[0][store.record(i)[1]]
    )


def step_batches(plan, step):
    numbers = range(step * plan.accumulate, (step + 1) * plan.accumulate)
    return [plan.micro_batch(m, rank) for m in numbers for rank in range(plan.world)]


def test_a_record_of_n_tokens_gives_n_minus_1_targets(tmp_path):
    store = make_store(tmp_path / "s", [4, 3], masks=[[0, 0, 1, 1], [0, 1, 0]])
    batch = BatchPlan(store, ctx_len=5, shuffle=False).micro_batch(0, 0)
    assert batch.inputs.tolist() == [[1, 2, 3, 5, 6]]
    assert batch.targets.tolist() == [[2, 3, 4, 6, 7]]
    assert batch.mask.tolist() == [[False, True, True, True, False]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5]
    assert (batch.count.item(), batch.count.dtype, batch.count.shape) == (3, torch.int64, ())
    assert (batch.inputs.dtype, batch.mask.dtype) == (torch.int64, torch.bool)


def test_rows_without_packing_are_padded_at_the_right(tmp_path):
    store = make_store(tmp_path / "s", [4, 3])
    plan = BatchPlan(store, ctx_len=5, micro_bsz=2, shuffle=False, packing=False)
    batch = plan.micro_batch(0, 0)
    assert batch.inputs.tolist() == [[1, 2, 3], [5, 6, 0]]
    assert batch.targets.tolist() == [[2, 3, 4], [6, 7, 0]]
    assert batch.mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.cu_seqlens is None


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_brings_the_places_of_what_is_scored(tmp_path, packing):
    """In rows of 5: the second row begins at 5. A part of the batch has to find its own."""
    masks = [[0, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0]]
    plan = BatchPlan(
        make_store(tmp_path / "s", [6, 6], masks=masks),
        ctx_len=5,
        micro_bsz=2,
        shuffle=False,
        packing=packing,
    )
    batch = plan.micro_batch(0, 0)
    assert batch.places.tolist() == [1, 2, 4, 5, 7]
    assert batch.scored_places() is batch.places
    assert batch.columns(1, 4).scored_places().tolist() == ([0, 1] if packing else [0, 1, 4])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_record_once_a_pass(store, world, accumulate, packing):
    plan = BatchPlan(
        store, ctx_len=64, micro_bsz=2, accumulate=accumulate, world=world, packing=packing
    )
    expected = all_targets(store)
    for number in range(2):
        steps = range(number * plan.steps_per_pass, (number + 1) * plan.steps_per_pass)
        batches = [b for step in steps for b in step_batches(plan, step)]
        assert scored_targets(batches) == expected
        assert plan.locate(steps[0]) == (number, 0)
        assert plan.locate(steps[-1]) == (number, plan.steps_per_pass - 1)


CUTS = [(1, 12, 1), (2, 3, 2), (3, 4, 1), (4, 1, 3), (1, 1, 12), (6, 2, 1)]


@pytest.mark.parametrize("packing", [True, False])
def test_no_cutting_changes_a_step(store, packing):
    """12 rows a step, dealt to ranks, micro-batches and rows in every way: same tokens, count."""
    plans = [
        BatchPlan(store, ctx_len=64, micro_bsz=b, accumulate=a, world=w, packing=packing, seed=5)
        for w, a, b in CUTS
    ]
    for step in range(plans[0].steps_per_pass + 1):
        seen = []
        for plan in plans:
            batches = step_batches(plan, step)
            assert {b.count.item() for b in batches} == {float(plan.count(step))}
            assert sum(int(b.mask.sum()) for b in batches) == plan.count(step)
            seen.append(scored_targets(batches))
        assert all(tokens == seen[0] for tokens in seen)


def test_the_last_step_is_dealt_evenly(tmp_path):
    store = make_store(tmp_path / "s", [5] * 11)
    plan = BatchPlan(store, ctx_len=4, micro_bsz=2, accumulate=2, world=2)
    assert (plan.rows_per_step, plan.steps_per_pass) == (8, 2)
    batches = step_batches(plan, 1)  # three rows for four micro-batches
    assert [b.inputs.shape[1] for b in batches] == [4, 4, 4, 1]
    assert batches[-1].mask.tolist() == [[False]]
    assert batches[-1].cu_seqlens.tolist() == [0, 1]
    assert {b.count.item() for b in batches} == {12.0}


def test_packed_rows_hold_at_most_the_micro_batch(store):
    plan = BatchPlan(store, ctx_len=64, micro_bsz=3)
    for step in range(plan.steps_per_pass):
        batch = plan.micro_batch(step, 0)
        assert batch.inputs.shape[0] == 1 and batch.inputs.shape[1] <= 3 * 64
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == batch.inputs.shape[1]
        assert (batch.cu_seqlens.diff() > 0).all()


@pytest.mark.parametrize("packing", [True, False])
def test_the_fullest_row_is_counted(store, packing):
    plan = BatchPlan(store, ctx_len=64, packing=packing)
    rows = [plan.micro_batch(step, 0) for step in range(plan.steps_per_pass)]
    texts = max(len(row.cu_seqlens) - 1 if packing else len(row.inputs) for row in rows)
    assert plan.most_texts == texts and (texts > 1) == packing


def test_passes_and_seeds_differ_and_repeat(store):
    def first(seed, number):
        plan = BatchPlan(store, ctx_len=64, seed=seed)
        return plan.micro_batch(number * plan.steps_per_pass, 0).inputs.flatten().tolist()

    orders = [first(0, 0), first(0, 1), first(1, 0)]
    assert orders == [first(0, 0), first(0, 1), first(1, 0)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_without_shuffle_the_order_is_the_files(store):
    plan = BatchPlan(store, ctx_len=64, shuffle=False)
    starts = [
        int(t)
        for m in range(plan.steps_per_pass)
        for batch in [plan.micro_batch(m, 0)]
        for t in batch.inputs[0, batch.cu_seqlens[:-1]]
    ]
    assert starts == [int(store.record(i)[0][0]) for i in range(len(store))]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing(store, workers):
    plan = BatchPlan(store, ctx_len=64, micro_bsz=2, world=2)
    loader = make_loader(plan, 1, 3, 17, workers)
    assert len(loader) == 14
    for number, batch in enumerate(loader, start=3):
        expected = plan.micro_batch(number, 1)
        assert torch.equal(batch.inputs, expected.inputs)
        assert torch.equal(batch.cu_seqlens, expected.cu_seqlens)
        assert batch.count == expected.count


def test_plain_text_is_split_without_losing_a_target(tmp_path):
    """10 tokens, room for 4 inputs: 1..5, 5..9, 9..10; each begins with the last one's end."""
    store = make_store(tmp_path / "s", [10, 3])
    plan = BatchPlan(store, ctx_len=4, shuffle=False, packing=False)
    inputs = [plan.micro_batch(m, 0).inputs[0].tolist() for m in range(4)]
    assert inputs == [[1, 2, 3, 4], [5, 6, 7, 8], [9], [11, 12]]
    assert scored_targets([plan.micro_batch(m, 0) for m in range(4)]) == all_targets(store)
    assert plan.pieces.report["split"] == 1
    assert plan.pieces.report["scored targets lost"] == 0


def test_dialogues_are_cut_at_the_end(tmp_path):
    store = make_store(tmp_path / "s", [10, 3], dialogue=True)
    plan = BatchPlan(store, ctx_len=4, shuffle=False, packing=False)
    inputs = [plan.micro_batch(m, 0).inputs[0].tolist() for m in range(plan.rows_per_pass)]
    assert inputs == [[1, 2, 3, 4], [11, 12]]
    assert plan.pieces.report["cut"] == 1
    assert plan.pieces.report["scored targets lost"] == 5


@pytest.mark.parametrize("rule, pieces", [("split", 4), ("cut", 2), ("drop", 1)])
@pytest.mark.parametrize("dialogue", [True, False])
def test_overlong_rules(tmp_path, rule, pieces, dialogue):
    store = make_store(tmp_path / "s", [10, 3], dialogue=dialogue)
    assert len(store.pieces(4, rule).record) == pieces


@pytest.mark.parametrize("room, pieces", [(9, 1), (8, 2)])
def test_ctx_len_counts_inputs(tmp_path, room, pieces):
    assert len(make_store(tmp_path / "s", [10]).pieces(room, "auto").record) == pieces


def test_pieces_without_a_scored_target_are_left_out(tmp_path):
    """Cut after 4 inputs the first dialogue has no answer left; the second was never scored."""
    masks = [[0] * 8 + [1, 1], [0, 0, 0], [0, 1, 0, 1]]
    store = make_store(tmp_path / "s", [10, 3, 4], dialogue=True, masks=masks)
    pieces = store.pieces(4, "auto")
    assert pieces.record.tolist() == [2]
    assert pieces.report["pieces without a scored target"] == 2
    split = store.pieces(4, "split")
    assert split.record.tolist() == [0, 0, 2] and split.scored.tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    "sizes, capacity",
    [
        ([1], 1),
        ([7] * 5, 7),
        ([3, 3, 3, 2, 2, 1], 7),
        (np.random.default_rng(0).integers(1, 100, 3000), 100),
        (np.random.default_rng(1).integers(1, 9, 500), 64),
    ],
)
@pytest.mark.parametrize("pack", [best_fit, in_order])
def test_packing_places_each_piece_once_within_its_row(pack, sizes, capacity):
    sizes = np.array(sizes)
    order, bounds = pack(sizes, capacity)
    placed = (np.sort(sizes)[::-1] if pack is best_fit else sizes)[order]
    assert sorted(order.tolist()) == list(range(len(sizes)))
    assert (bounds[0], bounds[-1]) == (0, len(sizes))
    rows = np.add.reduceat(placed, bounds[:-1])
    assert (np.diff(bounds) > 0).all() and rows.max() <= capacity


def test_best_fit_by_hand():
    """Room 10: 7 takes 3, 6 takes 4, and 5 opens a row of its own."""
    order, bounds = best_fit(np.array([3, 7, 6, 4, 5]), 10)
    rows = [order[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
    assert rows == [[0, 4], [1, 3], [2]]  # places by falling size: 7 6 5 4 3


def test_rows_are_nearly_full(tmp_path):
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 4000), 5, 2000).astype(int)
    store = make_store(tmp_path / "s", lengths)
    assert BatchPlan(store, ctx_len=4096).fill > 0.98
    assert BatchPlan(store, ctx_len=4096, packing=False).fill < 0.1


def test_many_pieces_fill_their_rows():
    sizes = np.clip(np.random.default_rng(0).lognormal(5, 1, 100_000), 1, 4096).astype(np.int64)
    order, bounds = best_fit(sizes, 4096)
    assert np.array_equal(np.sort(order), np.arange(len(sizes)))
    rows = np.add.reduceat(np.sort(sizes)[::-1][order], bounds[:-1])
    assert rows.max() <= 4096 and rows[:-1].min() > 2048


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"ctx_len": 0}, r"--ctx_len 0: must be at least 1"),
        ({"ctx_len": 8, "overlong": "x"}, r"--overlong x: is not one of auto, split, cut, drop"),
        ({"ctx_len": 1, "overlong": "drop"}, r"--ctx_len 1 --overlong drop: no record has a"),
        ({"ctx_len": 8, "world": 0}, r"plan: world is 0, which is too small"),
        ({"ctx_len": 8, "seed": -1}, r"plan: seed is -1, which is too small"),
    ],
)
def test_mistakes_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        BatchPlan(make_store(tmp_path / "s", [5, 6]), **arguments)
    assert isinstance(caught.value, InputError) == message.startswith("--")
