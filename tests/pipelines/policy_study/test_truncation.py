"""Is what is cut from the rows really gone, and counted as dropped?"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ctxprune import UserError, tasks
from pipelines.policy_study import small_model
from pipelines.policy_study.measure import measure, passed, predictions
from pipelines.policy_study.methods import named, retrofitted
from pipelines.policy_study.truncation import columns, cut

TASK = tasks.RecallConfig(length=32, facts=3, decoys=2, keys=8, values=8, fillers=8)
ROWS = TASK.batch("test", 0, 0, 8)
N = ROWS.input_ids.shape[1]


def model_of(name: str, share: float):
    return retrofitted(named([name])[0], small_model.build(TASK.vocab_size, small_model.Shape(), 0), TASK, share, 0)


def test_the_first_token_the_last_ones_and_the_questions_stay():
    shown = columns(ROWS, 0.25, 1)
    assert shown.tolist() == [0, *range(25, N)]  # 8 of 32, and all behind these
    given = cut(ROWS, shown)
    assert given.end == 8 and given.input_ids.shape == (8, N - 24)
    assert torch.equal(given.answers[:, 8:], ROWS.answers[:, 32:]) and torch.equal(given.difficulty, ROWS.difficulty)
    assert torch.equal(cut(ROWS, columns(ROWS, 1.0, 1)).input_ids, ROWS.input_ids)


def test_what_stays_never_saw_the_rest_unlike_what_recency_keeps():
    other = TASK.batch("test", 1, 0, 8)
    mixed = torch.where((torch.arange(N) > 0) & (torch.arange(N) < 25), other.input_ids, ROWS.input_ids)
    changed = cut(ROWS, torch.arange(N))
    changed.input_ids.copy_(mixed)
    shown = columns(ROWS, 0.25, 1)
    model = model_of("truncation", 0.25)
    assert torch.equal(passed(model, cut(ROWS, shown))[1], passed(model, cut(changed, shown))[1])
    recency = model_of("recency", 0.25)
    assert not torch.allclose(passed(recency, ROWS)[1][:, 32:], passed(recency, changed)[1][:, 32:])


def test_what_is_not_shown_counts_as_dropped():
    """The same keys as recency keeps, so the same shares, precision and recall."""
    (method,) = named(["truncation"])
    found = measure(model_of("truncation", 0.25), TASK, 64, shown=partial(method.shown, share=0.25))
    wanted = measure(model_of("recency", 0.25), TASK, 64)
    for name in ("kept", "precision", "recall"):
        assert torch.allclose(getattr(found, name), getattr(wanted, name), equal_nan=True)
    assert torch.allclose(found.kept, torch.full_like(found.kept, 0.25))


def test_a_model_that_is_shown_everything_agrees_with_itself():
    model = model_of("truncation", 1.0)
    said = predictions(model, TASK, 64)
    assert (measure(model, TASK, 64, dense=said, shown=partial(columns, share=1.0, first=1)).agreement == 1).all()
    less = measure(model, TASK, 64, dense=said, shown=partial(columns, share=0.25, first=1)).agreement
    assert less.shape == (64,) and (less < 1).any()


def test_rows_whose_contexts_end_apart_are_refused():
    apart = cut(ROWS, torch.arange(N))
    apart.context_end[0] = 5
    with pytest.raises(UserError, match="end at different places"):
        columns(apart, 0.5, 1)
