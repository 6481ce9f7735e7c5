"""Is a batch a pure function of seed, step and rank, does an epoch visit everything once, do documents stay apart?"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctxprune.errors import UserError
from ctxprune.text.batches import IGNORED, Batch, held_out_batches, targets, train_batch
from ctxprune.text.token_store import TokenSplit, pack

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def numbered(lengths: list[int]) -> TokenSplit:
    """Documents of these lengths whose token ids count 0, 1, 2, ... through the whole text."""
    split = pack([np.arange(length) for length in lengths], 1000)
    return TokenSplit(np.arange(len(split.tokens), dtype=np.uint16), split.starts)


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.input_ids, other.input_ids) and torch.equal(one.position_ids, other.position_ids)


def joined(batches: list[Batch]) -> Batch:
    ids = torch.cat([batch.input_ids for batch in batches])
    return Batch(ids, torch.cat([batch.position_ids for batch in batches]))


def expected_positions(split: TokenSplit, row: list[int]) -> list[int]:
    """The rule, token by token: 0 at the row's start and at each document's, else one more than before."""
    starts = set(split.starts.tolist())
    positions: list[int] = []
    for token in row:
        positions.append(0 if not positions or token in starts else positions[-1] + 1)
    return positions


@given(LENGTHS, st.integers(0, 5), st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 12))
def test_a_batch_depends_on_its_arguments_alone(
    lengths: list[int], seed: int, step: int, batch: int, context: int
) -> None:
    split = numbered(lengths)
    if len(split.tokens) < context:
        return
    first = train_batch(split, seed, step, 0, 1, batch, context)
    np.random.default_rng(1).random()
    torch.manual_seed(step)
    train_batch(split, seed + 1, step + 1, 0, 1, batch, context)
    assert same(first, train_batch(split, seed, step, 0, 1, batch, context))
    assert first.input_ids.dtype == first.position_ids.dtype == torch.int64
    assert first.input_ids.shape == first.position_ids.shape == (batch, context)


@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 9), st.integers(1, 12))
def test_ranks_partition_the_same_global_batch(
    lengths: list[int], world: int, share: int, step: int, context: int
) -> None:
    split = numbered(lengths)
    if len(split.tokens) < context:
        return
    batch = world * share
    whole = train_batch(split, 3, step, 0, 1, batch, context)
    parts = [train_batch(split, 3, step, rank, world, batch, context) for rank in range(world)]
    assert {part.input_ids.shape for part in parts} == {(share, context)}
    assert same(joined(parts), whole)


@given(LENGTHS, st.integers(0, 4), st.integers(1, 12))
def test_an_epoch_visits_each_window_once(lengths: list[int], seed: int, context: int) -> None:
    split = numbered(lengths)
    tokens = len(split.tokens)
    windows = tokens // context
    if not windows:
        return
    for epoch in range(2):
        steps = range(epoch * windows, (epoch + 1) * windows)
        rows = joined([train_batch(split, seed, step, 0, 1, 1, context) for step in steps]).input_ids
        seen = rows.flatten().tolist()
        assert len(seen) == len(set(seen)) == windows * context
        assert torch.equal((rows[:, :1] + torch.arange(context)) % tokens, rows), "windows are consecutive"


def test_epochs_and_seeds_differ_in_order_and_offset() -> None:
    split = numbered([500])

    def begins(seed: int, epoch: int) -> list[int]:
        return train_batch(split, seed, epoch, 0, 1, 62, 8).input_ids[:, 0].tolist()

    orders = [begins(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert len({begin % 8 for order in orders for begin in order}) > 3, "the offset moves the cuts"
    for order in orders:
        follows = sum((after - before) % 500 == 8 for before, after in pairwise(order))
        assert follows < 10, "neighbouring windows are not visited one after the other"


def test_a_batch_may_reach_over_several_epochs() -> None:
    rows = train_batch(numbered([20]), 0, 0, 0, 1, 7, 8).input_ids
    assert [len({*rows[first].tolist(), *rows[first + 1].tolist()}) for first in (0, 2, 4)] == [16, 16, 16]


@given(LENGTHS, st.integers(0, 50), st.integers(1, 12))
def test_positions_restart_at_each_document(lengths: list[int], step: int, context: int) -> None:
    split = numbered(lengths)
    if len(split.tokens) < context:
        return
    batch = joined(
        [train_batch(split, 0, step, 0, 1, 3, context), *held_out_batches(split, 2, context, len(split.tokens))]
    )
    for ids, positions in zip(batch.input_ids.tolist(), batch.position_ids.tolist(), strict=True):
        assert positions == expected_positions(split, ids)


@given(LENGTHS, st.integers(0, 50), st.integers(1, 12))
def test_nothing_predicts_the_next_document(lengths: list[int], step: int, context: int) -> None:
    split = numbered(lengths)
    if len(split.tokens) < context:
        return
    batch = train_batch(split, 0, step, 0, 1, 4, context)
    labels = targets(batch)
    starts = set(split.starts.tolist())
    for ids, row in zip(batch.input_ids.tolist(), labels.tolist(), strict=True):
        wanted = [IGNORED if token in starts else token for token in ids[1:]]
        assert row == [*wanted, IGNORED]


@given(LENGTHS, st.integers(1, 5), st.integers(1, 12), st.integers(1, 300))
def test_held_out_windows_are_in_order_whole_and_bounded(
    lengths: list[int], batch: int, context: int, max_tokens: int
) -> None:
    split = numbered(lengths)
    tokens = len(split.tokens)
    if min(tokens, max_tokens) < context:
        return
    batches = list(held_out_batches(split, batch, context, max_tokens))
    assert all(len(part.input_ids) == batch for part in batches[:-1])
    rows = joined(batches).input_ids
    assert len(rows) == min(tokens // context, max_tokens // context)
    assert torch.equal(rows, rows[:, :1] + torch.arange(context))
    begins = rows[:, 0]
    assert begins[0] == 0
    assert torch.all(begins % context == 0)
    gaps = begins.diff() // context
    if len(gaps):
        assert gaps.min() >= 1, "no window twice"
        assert gaps.max() - gaps.min() <= 1, "spread evenly"
        assert tokens // context - begins[-1] // context <= gaps.max() + 1, "up to the end of the text"


def test_too_little_text_names_the_field() -> None:
    split = numbered([9])
    train = "train text has 9 tokens, fewer than train.context=10: give more text or lower train.context"
    with pytest.raises(UserError) as caught:
        train_batch(split, 0, 0, 0, 1, 1, 10)
    assert str(caught.value) == train
    with pytest.raises(UserError) as caught:
        held_out_batches(split, 1, 10, 100)
    assert str(caught.value) == train.replace("train text", "held-out text")
    with pytest.raises(UserError, match=r"evaluate\.tokens=4 is fewer than one context of 5"):
        held_out_batches(split, 1, 5, 4)


@pytest.mark.parametrize(("batch", "world", "choices"), [(10, 4, "8 or 12"), (3, 4, "4"), (0, 2, "2")])
def test_a_batch_that_does_not_divide_names_the_nearest(batch: int, world: int, choices: str) -> None:
    with pytest.raises(UserError) as caught:
        train_batch(numbered([50]), 0, 0, 0, world, batch, 5)
    assert str(caught.value) == f"train.batch={batch} does not divide over {world} workers: set it to {choices}"


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_our_mistake(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank}"):
        train_batch(numbered([50]), 0, 0, rank, 2, 4, 5)
