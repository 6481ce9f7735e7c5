"""Is a model pressed to drop more only as long as it still answers?"""

from __future__ import annotations

import pytest
import torch

import ctxprune
from ctxprune.policies import GateConfig
from ctxprune.tasks import from_dict
from pipelines.policy_study import fine_tune, jobs, small_model
from pipelines.policy_study.fine_tune import FineTuning, pressing

FIRST = [0.9] * 30


def test_a_model_is_pressed_less_the_more_answers_are_lost_and_not_at_all_from_a_fifth_on():
    assert pressing(FIRST + [0.9] * 8) == pressing(FIRST + [0.95] * 8) == 1.0
    assert pressing(FIRST + [0.9 * 0.9] * 8) == pytest.approx(0.5)
    assert pressing(FIRST + [0.9 * 0.8] * 8) == pytest.approx(0.0, abs=1e-9)
    assert pressing(FIRST + [0.2] * 50) == 0.0
    assert pressing(FIRST + [0.2] * 50 + [0.9] * 8) == 1.0, "answers that came back"


def test_one_batch_of_hard_rows_stops_nothing_and_a_model_that_never_answered_is_pressed():
    assert pressing(FIRST + [0.9] * 7 + [0.6]) > 0.5
    assert pressing([0.0] * 60) == pressing([0.9]) == 1.0


def test_gates_of_a_model_whose_answers_are_lost_are_not_pressed(monkeypatch):
    """The same steps with and without: what is dropped differs by what sparsity asks for alone."""

    def dropped(part: float | None) -> float:
        if part is not None:
            monkeypatch.setattr(fine_tune, "pressing", lambda right: part)
        torch.manual_seed(0)
        task = from_dict({"task": "recall"})
        model = ctxprune.retrofit(small_model.build(task.vocab_size, jobs.SHAPE, 0), GateConfig(rank=4, beta=1.0))
        kept = []
        monkeypatch.setattr(fine_tune.objective, "kept_share", lambda model: kept.append(real(model)) or kept[-1])
        fine_tune.fine_tune(model, task, FineTuning(steps=40, batch=4, sparsity=0.9, gate_learning_rate=3e-2))
        return 1.0 - kept[-1].item()

    real = fine_tune.objective.kept_share
    assert dropped(1.0) > dropped(0.0) + 0.05
