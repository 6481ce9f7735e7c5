"""Are unsure answers asked again with more context, and does the stated risk hold?"""

from __future__ import annotations

import math

import pytest
import torch

import ctxprune
from ctxprune import Cascade, UserError
from ctxprune.generation.cascade import (
    Stage,
    answered,
    calibrated,
    least_questions,
    lower_limit,
    lowest_threshold,
    upper_limit,
)
from tests.models import gated, tokens

CHOICES = torch.tensor([3, 14, 15, 92])


def questions(count: int, first: int = 0) -> list[torch.Tensor]:
    return [tokens(1, 24, seed=first + i)[0] for i in range(count)]


@pytest.fixture(scope="module")
def model():
    return gated(beta=1e4).double()  # the cap alone prunes


def exact(model, prompts) -> list[int]:
    with torch.no_grad(), ctxprune.mode(model, "dense"):
        return [int(model(prompt[None]).logits[0, -1, CHOICES].argmax()) for prompt in prompts]


def test_before_calibration_everything_is_asked_of_the_whole_context(model):
    prompts = questions(6)
    found = Cascade(model, CHOICES, budget=4).answer(prompts)
    assert found.answer.tolist() == exact(model, prompts) and found.budget.tolist() == [0] * 6


def test_a_sure_answer_is_given_early_and_an_unsure_one_later(model):
    prompts, cascade = questions(40), Cascade(model, CHOICES, budget=6)
    first = cascade.ask(prompts, 6).max(1)
    second = cascade.ask(prompts, 12).max(1)
    threshold = float(first.values.median())
    cascade.stages = [Stage(6, threshold), Stage(12, threshold)]
    found, whole = cascade.answer(prompts), exact(model, prompts)
    for i in range(40):
        if first.values[i] >= threshold:
            wanted = (6, int(first.indices[i]), first.values[i])
        elif second.values[i] >= threshold:
            wanted = (12, int(second.indices[i]), second.values[i])
        else:
            wanted = (0, whole[i], found.confidence[i])
        assert (int(found.budget[i]), int(found.answer[i]), found.confidence[i]) == wanted
    assert len(set(found.budget.tolist())) == 3


def test_the_stated_risk_holds_on_other_questions(model):
    cascade, risk = Cascade(model, CHOICES, budget=12), 0.2
    cascade.calibrate(questions(200), risk=risk, confidence=0.9)
    prompts = questions(200, first=1000)
    found, whole = cascade.answer(prompts), torch.tensor(exact(model, prompts))
    wrong = (found.answer != whole) & (found.budget > 0)
    assert (found.budget > 0).any() and wrong.double().mean() <= risk
    assert not (found.answer != whole)[found.budget == 0].any()


def test_rows_read_together_are_answered_as_alone(model):
    prompts = [tokens(1, length, seed=length)[0] for length in (24, 7, 19, 24, 12)]
    for budget in (None, 6):
        alone = Cascade(model, CHOICES, 6, batch=1).ask(prompts, budget)
        for batch in (2, 5):
            assert torch.allclose(Cascade(model, CHOICES, 6, batch=batch).ask(prompts, budget), alone, atol=1e-9)


def test_answers_that_are_there_are_calibrated_and_given_as_prompts_are(model):
    cascade, prompts = Cascade(model, CHOICES, budget=12), questions(120)
    small, whole = {budget: cascade.ask(prompts, budget) for budget in (12, 24)}, cascade.ask(prompts)
    cascade.calibrate(prompts, risk=0.4)
    assert cascade.stages == calibrated(small, whole, risk=0.4, confidence=0.95)
    assert any(stage.threshold < math.inf for stage in cascade.stages)
    given, found = answered(cascade.stages, small, whole), cascade.answer(prompts)
    assert torch.equal(given.answer, found.answer) and torch.equal(given.budget, found.budget)
    assert torch.allclose(given.confidence, found.confidence, atol=1e-9)


def test_a_later_stage_is_judged_on_all_questions():
    """Ten errors of the second stage, on questions that the first answers: what the first leaves was chosen on these
    very questions, and errors must not vanish by that."""
    right = torch.tensor([[0.9, 0.1]]).repeat(200, 1)
    second = right.clone()
    second[:10] = torch.tensor([0.05, 0.95])
    first, after = calibrated({4: right, 8: second}, right, risk=0.1, confidence=0.95)
    assert first.threshold < 0.91 and upper_limit(10, 200, 0.975) > 0.05 and after.threshold == math.inf


def test_so_many_questions_are_just_enough():
    for risk, confidence in ((0.01, 0.95), (0.05, 0.95), (0.1, 0.9)):
        least = least_questions(risk, confidence)
        side = 1 - (1 - confidence) / 2
        assert upper_limit(0, least, side) <= risk / 2 < upper_limit(0, least - 1, side)
    assert least_questions(0.01, 0.95) == 736


def test_the_less_risk_the_stricter():
    generator = torch.Generator().manual_seed(0)
    sure = torch.rand(400, generator=generator)
    wrong = torch.rand(400, generator=generator) > sure
    everyone = torch.ones(400, dtype=torch.bool)
    thresholds = [lowest_threshold(sure, wrong, everyone, risk, 0.95) for risk in (0.3, 0.1, 0.03, 1e-4)]
    assert thresholds == sorted(thresholds) and thresholds[0] < thresholds[2] and thresholds[3] == math.inf


def test_over_many_calibrations_the_bound_fails_as_seldom_as_it_says():
    """Confidences whose error rate is known: P(wrong | sure) = 1 - sure, sure uniform."""
    generator, failures, runs, risk = torch.Generator().manual_seed(1), 0, 400, 0.1
    everyone = torch.ones(150, dtype=torch.bool)
    for _ in range(runs):
        sure = torch.rand(150, generator=generator, dtype=torch.double)
        wrong = torch.rand(150, generator=generator, dtype=torch.double) > sure
        threshold = lowest_threshold(sure, wrong, everyone, risk, 0.9)
        true = 0.0 if threshold == math.inf else (1 - threshold) ** 2 / 2
        failures += true > risk
    assert failures / runs <= 0.1 + 3 * (0.1 * 0.9 / runs) ** 0.5


def test_twin_a_bound_without_its_margin_fails_too_often(monkeypatch):
    monkeypatch.setattr("ctxprune.generation.cascade.upper_limit", lambda errors, trials, confidence: errors / trials)
    with pytest.raises(AssertionError):
        test_over_many_calibrations_the_bound_fails_as_seldom_as_it_says()


def test_limits_are_clopper_and_pearsons():
    assert upper_limit(0, 20, 0.95) == pytest.approx(1 - 0.05 ** (1 / 20))
    assert upper_limit(3, 50, 0.95) == pytest.approx(0.14784, abs=1e-4)
    assert upper_limit(5, 5, 0.95) == 1.0
    assert lower_limit(0, 20, 0.95) == 0.0 and lower_limit(5, 5, 0.95) == pytest.approx(0.05 ** (1 / 5))
    assert lower_limit(3, 50, 0.975) == pytest.approx(0.012549, abs=1e-5)


def test_what_cannot_be_is_refused(model):
    for build, named in (
        (lambda: Cascade(model, CHOICES[:1], 4), "1 choices"),
        (lambda: Cascade(model, CHOICES, 0), "budget is 0"),
        (lambda: Cascade(model, CHOICES, 4, batch=0), "batch is 0"),
        (lambda: Cascade(model, CHOICES, 4).calibrate([]), "no questions"),
        (lambda: Cascade(model, CHOICES, 4).calibrate(questions(2), risk=0.0), "risk is 0"),
        (lambda: Cascade(model, CHOICES, 4).calibrate(questions(2), confidence=1.0), "confidence is 1"),
        (lambda: Cascade(model, CHOICES, 4).answer([torch.tensor([], dtype=torch.long)]), "prompt is empty"),
    ):
        with pytest.raises(UserError, match=named):
            build()
