"""Are answers counted as they were asked, and are intervals over rows honest?"""

from __future__ import annotations

import math

import pytest
import torch

from ctxprune.errors import UserError
from ctxprune.tasks.recall import RecallConfig
from ctxprune.tasks.scoring import answered, in_context, keep_set, loss, paired_bootstrap, pearson, score, spearman
from ctxprune.tasks.task import TaskBatch
from ctxprune.text.batches import IGNORED


def batch(answers, questions, **fields) -> TaskBatch:
    answers = torch.tensor(answers)
    end = torch.zeros(len(answers), dtype=torch.long)
    return TaskBatch(torch.zeros_like(answers), answers, torch.tensor(questions), end, **fields)


def saying(tokens) -> torch.Tensor:
    """Logits whose most likely token at each position is the given one."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), 10).float()


I = IGNORED  # noqa: E741 (a column of it reads best as one letter)


def test_a_question_of_several_tokens_is_right_when_all_of_them_are():
    rows = batch([[I, 1, 2, 3], [I, 1, 2, 3]], [[-1, 0, 0, 1], [-1, 0, 0, 1]])
    said = saying([[9, 1, 2, 9], [9, 9, 2, 3]])
    assert answered(said, rows).tolist() == [[1, 0], [0, 1]]
    assert score(said, rows).tolist() == [0.5, 0.5]


def test_a_row_with_fewer_questions_is_scored_over_its_own():
    rows = batch([[1, 2], [1, I]], [[0, 1], [0, -1]])
    said = saying([[1, 9], [1, 9]])
    assert math.isnan(answered(said, rows)[1, 1])
    assert score(said, rows).tolist() == [0.5, 1]


def test_an_answer_that_is_not_counted_is_trained_on_but_not_scored():
    rows = batch([[1, 2]], [[0, -1]])
    assert score(saying([[1, 9]]), rows).tolist() == [1]
    assert loss(saying([[1, 9]]), rows) > loss(saying([[1, 2]]), rows)


def test_a_classifier_of_rows_is_scored_through_the_same_door():
    rows = batch([[1, I, I], [0, I, I]], [[0, -1, -1], [0, -1, -1]])
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert score(logits[:, None].expand(-1, 3, -1), rows).tolist() == [1, 0]


def test_the_right_answers_score_one_and_the_wrong_ones_nothing():
    task = RecallConfig()
    rows = task.batch("test", 0, 0, 32)
    right = torch.nn.functional.one_hot(rows.answers.clamp(min=0), task.vocab_size).float()
    assert (score(right, rows) == 1).all() and (score(-right, rows) == 0).all()


def test_the_bootstrap_finds_a_difference_and_covers_none():
    generator = torch.Generator().manual_seed(0)
    a, noise = torch.rand(300, generator=generator), torch.rand(300, generator=generator)
    difference, low, high = paired_bootstrap(a + 0.2, a, seed=1)
    assert difference == pytest.approx(0.2) and low == pytest.approx(0.2) and high == pytest.approx(0.2)
    difference, low, high = paired_bootstrap(a, noise, seed=1, resamples=500)
    assert low < difference < high and low < 0 < high
    assert (difference, low, high) == paired_bootstrap(a, noise, seed=1, resamples=500)


def test_the_interval_has_the_width_of_the_normal_one():
    difference = torch.randn(400, generator=torch.Generator().manual_seed(0))
    _, low, high = paired_bootstrap(difference, torch.zeros(400), resamples=4000)
    assert high - low == pytest.approx(2 * 1.96 * difference.std().item() / 20, rel=0.1)


@pytest.mark.parametrize(
    "a, b, says", [([1.0], [1.0, 0.0], "the same rows"), ([], [], "the same rows"), ([math.nan], [1.0], "NaN")]
)
def test_scores_that_are_not_pairs_are_refused(a, b, says):
    with pytest.raises(UserError, match=says):
        paired_bootstrap(torch.tensor(a), torch.tensor(b))


def test_a_keep_set_is_compared_with_what_is_needed_in_the_context():
    rows = RecallConfig().batch("test", 0, 0, 16)
    precision, recall = keep_set(rows.needed, rows)
    assert (precision == 1).all() and (recall == 1).all()
    precision, recall = keep_set(torch.ones_like(rows.needed), rows)
    assert torch.allclose(precision, rows.needed.sum(1) / RecallConfig().length) and (recall == 1).all()
    precision, recall = keep_set(~in_context(rows), rows)  # the questions themselves do not count
    assert precision.isnan().all() and (recall == 0).all()


def test_a_needed_mask_that_is_shifted_by_one_costs_precision_and_recall():
    rows = RecallConfig().batch("test", 0, 0, 16)
    precision, recall = keep_set(rows.needed.roll(1, dims=1), rows)
    assert (precision < 1).all() and (recall < 1).all()


def test_padding_is_no_context():
    mask = torch.tensor([[0, 1, 1]])
    rows = TaskBatch(
        torch.zeros(1, 3, dtype=torch.long), torch.full((1, 3), I), torch.full((1, 3), -1), torch.tensor([2]), mask
    )
    assert in_context(rows).tolist() == [[False, True, False]]
    assert rows.position_ids.tolist() == [[0, 0, 1]]
    with pytest.raises(UserError, match="does not know which tokens are needed"):
        keep_set(in_context(rows), rows)


def test_correlations():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert pearson(x, 2 * x + 1) == pytest.approx(1) and pearson(x, -x) == pytest.approx(-1)
    assert spearman(x, x.exp()) == pytest.approx(1) and pearson(x, x.exp()) < 0.95
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: by hand 4.5 / sqrt(4.5 * 5).
    assert spearman(torch.tensor([1.0, 2.0, 2.0, 9.0]), x) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(pearson(x, torch.ones(4)))
