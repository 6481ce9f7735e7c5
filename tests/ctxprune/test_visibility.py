"""Do document ends, lifetimes and protected tokens say exactly which keys a query may see?"""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from ctxprune.policies.rule import FOREVER, Rule
from ctxprune.policies.window import WindowRule
from ctxprune.visibility import ends, guards, layout, lifetimes, visible_pairs

CPU = torch.device("cpu")


@st.composite
def rows(draw) -> torch.Tensor:
    """position_ids of one row of packed documents; the first may have begun earlier."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    first = draw(st.integers(0, 3))
    parts = [torch.arange(length) + (first if index == 0 else 0) for index, length in enumerate(lengths)]
    return torch.cat(parts)[None]


@given(rows())
def test_a_document_ends_where_positions_stop_rising_by_one(position):
    plan = layout(position.shape, position, None, CPU)
    row = position[0].tolist()
    for j in range(len(row)):
        end = next((k for k in range(j + 1, len(row)) if row[k] != row[k - 1] + 1), len(row))
        assert plan.end[0, j] == end
    assert plan.packed == any(later != row + 1 for row, later in itertools.pairwise(row))


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_nothing_sees_padding_and_padding_sees_nothing(real):
    n = len(real)
    plan = layout((1, n), None, torch.tensor([real]), CPU)
    for j in range(n):
        for k in range(j + 1, n):
            sees = k < plan.end[0, j]
            assert bool(sees) == all(real[j : k + 1])


def test_padding_of_earlier_tokens_is_left_aside():
    """A mask longer than the rows (as transformers keeps it while decoding) speaks of the last n tokens."""
    plan = layout((1, 2), None, torch.tensor([[False, False, True, True]]), CPU)
    assert not plan.packed


def test_plain_rows_are_one_document():
    plan = layout((2, 4), None, None, CPU)
    assert plan.end.tolist() == [[4] * 4] * 2 and plan.position.tolist() == [[0, 1, 2, 3]] * 2 and not plan.packed
    assert visible_pairs(plan.end).tolist() == [6, 6]


@given(rows())
def test_visible_pairs_count_earlier_keys_of_the_same_document(position):
    plan = layout(position.shape, position, None, CPU)
    n = position.shape[1]
    count = sum(bool(j < k < plan.end[0, j]) for j in range(n) for k in range(n))
    assert visible_pairs(plan.end).tolist() == [count]
    assert visible_pairs(plan.end + torch.where(plan.end == n, 5, 0)).tolist() == [count]


def test_lifetimes_protect_sinks_and_recent_tokens_from_the_rule():
    position = torch.arange(6)[None]
    assert lifetimes(position, WindowRule(2), 0, 0, None).tolist() == [[2] * 6]
    assert lifetimes(position, WindowRule(2), 2, 0, None).tolist() == [[FOREVER, FOREVER, 2, 2, 2, 2]]
    assert lifetimes(position, WindowRule(2), 0, 3, None).tolist() == [[4] * 6]
    assert lifetimes(position, Rule(), 2, 3, None) is None


def test_the_models_own_sliding_window_binds_even_the_protected():
    position = torch.arange(4)[None]
    assert lifetimes(position, Rule(), 0, 0, 3).tolist() == [[3] * 4]
    assert lifetimes(position, WindowRule(2), 1, 5, 3).tolist() == [[3] * 4]
    assert lifetimes(position, WindowRule(2), 0, 0, 3).tolist() == [[2] * 4]


def test_an_end_is_the_earlier_of_document_and_lifetime():
    plan = layout((1, 6), torch.tensor([[0, 1, 2, 0, 1, 2]]), None, CPU)
    assert ends(plan, None) is plan.end
    assert ends(plan, torch.full((1, 6), 2)).tolist() == [[2, 3, 3, 5, 6, 7]]


def test_guards_are_the_first_row_whose_gate_may_drop():
    position = torch.tensor([[0, 1, 2, 0, 1]])
    assert guards(position, 0, 0) is None
    assert guards(position, 1, 0).tolist() == [[FOREVER, 2, 3, FOREVER, 5]]
    assert guards(position, 0, 2).tolist() == [[3, 4, 5, 6, 7]]
