"""Are the three terms of the loss, and the schedule of alpha, what their formulas say?"""

from __future__ import annotations

import math

import pytest
import torch

from ctxprune.objective import IGNORED, alpha_at, distillation_loss, kept_share, next_token_loss
from ctxprune.retrofitting import set_alpha, state_of
from tests.models import gated, tokens

LOGITS = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
TEACHER = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([[1, 4, IGNORED, 0], [IGNORED, 2, 2, 3]])


def test_the_next_token_loss_is_the_mean_surprise_of_the_predicted_tokens():
    surprise = [
        -math.log(torch.softmax(LOGITS[b, t].double(), -1)[TARGETS[b, t]].item())
        for b in range(2)
        for t in range(4)
        if TARGETS[b, t] != IGNORED
    ]
    assert next_token_loss(LOGITS, TARGETS).item() == pytest.approx(sum(surprise) / len(surprise), rel=1e-6)


def test_distillation_is_the_mean_divergence_from_the_teacher_over_the_predicted_tokens():
    wanted = []
    for b in range(2):
        for t in range(4):
            if TARGETS[b, t] != IGNORED:
                p, q = (torch.softmax(x[b, t].double(), -1) for x in (TEACHER, LOGITS))
                wanted.append((p * (p / q).log()).sum().item())
    assert distillation_loss(LOGITS, TEACHER, TARGETS).item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-6)
    assert distillation_loss(TEACHER, TEACHER, TARGETS).item() == pytest.approx(0.0, abs=1e-6)


def test_low_precision_logits_are_scored_in_float32():
    for loss in (next_token_loss(LOGITS.bfloat16(), TARGETS), distillation_loss(*[LOGITS.bfloat16()] * 2, TARGETS)):
        assert loss.dtype == torch.float32


def test_less_kept_is_a_smaller_share_with_a_gradient_that_closes_gates():
    model, ids = gated(), tokens(2, 16)
    set_alpha(model, 1.5)
    model.train()(ids)
    share = kept_share(model)
    assert 0 < share.item() < 1
    share.backward()
    betas = [p for name, p in model.named_parameters() if name.endswith("beta")]
    assert all(beta.grad > 0 for beta in betas)
    with torch.no_grad():
        for beta in betas:
            beta.sub_(1.0)
        model(ids)
    assert kept_share(model) < share.item() and len(state_of(model).survival) == len(betas)


def test_alpha_rises_along_a_cosine_and_then_stays():
    assert [alpha_at(p, 1.1, 8.0) for p in (-1.0, 0.0)] == [pytest.approx(1.1)] * 2
    assert alpha_at(0.5, 1.0, 8.0) == pytest.approx(4.5)
    assert alpha_at(0.25, 1.0, 8.0) == pytest.approx(8 - 3.5 * (1 + math.sqrt(0.5)))
    assert [alpha_at(p, 1.1, 8.0) for p in (1.0, 7.0)] == [8.0, 8.0]
    rising = [alpha_at(i / 100, 1.001, 8.0) for i in range(101)]
    assert rising == sorted(rising)
