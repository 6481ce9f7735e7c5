"""Does a bandit learn how much an input needs, and does its policy keep what it chooses?"""

from __future__ import annotations

import math

import pytest
import torch

import ctxprune
from ctxprune import UserError
from ctxprune.policies import BanditConfig, DenseConfig
from ctxprune.policies.bandit import last_kept
from ctxprune.replay import read
from ctxprune.retrofitting import wrappers
from ctxprune.tasks.scoring import pearson
from ctxprune.teachers import reward
from ctxprune.teachers.bandit import drawn, kept, preferences, teach_budgets
from ctxprune.teachers.reward import RewardConfig
from tests.models import TASK, recaller, small_model

ARMS = (0.125, 0.25, 0.5, 1.0)
END = TASK.length


def bandits(model):
    return [wrapper.rule.ranking.scorer for wrapper in wrappers(model)]


def decided(arm: int, **settings):
    """A model that chooses this budget whatever it reads."""
    model = recaller(BanditConfig(arms=ARMS, sinks=0, recent=0, **settings)).double()
    with torch.no_grad():
        for scorer in bandits(model):
            scorer.choose[-1].weight.zero_()
            scorer.choose[-1].bias.copy_(40.0 * torch.nn.functional.one_hot(torch.tensor(arm), len(ARMS)))
    return model


def stays(model, ids) -> torch.Tensor:
    """(layers, batch, context) keys that the model's own layers keep."""
    whole = torch.cat([ids, ids[:, :1]], 1)
    return ctxprune.drop_times(model, whole, prompt=torch.full((len(ids),), END)).drop_time[..., :END] > END


@pytest.mark.parametrize("arm", range(len(ARMS)))
def test_layers_keep_what_the_teacher_says_a_budget_keeps(arm):
    model, ids = decided(arm), TASK.batch("test", 0, 0, 5).input_ids[:, :END]
    context, found = read(model, ids), stays(decided(arm), ids)
    for layer, scorer in enumerate(bandits(model)):
        taught = kept(scorer, context, layer, torch.full((1, 5), arm))[0]
        assert torch.equal(found[layer], taught) and (taught.sum(-1) == math.ceil(ARMS[arm] * END)).all()


def test_an_undecided_network_keeps_something_between_its_budgets():
    model, ids = decided(0), TASK.batch("test", 0, 0, 5).input_ids[:, :END]
    with torch.no_grad():
        for scorer in bandits(model):
            scorer.choose[-1].bias[1] = 40.0
    count = stays(model, ids).sum(-1)
    assert (count >= 3).all() and (count <= 6).all() and (count > 3).any()


def test_the_last_key_kept_lies_above_the_next():
    logs = torch.tensor([[3.0, 9.0, 1.0, 5.0], [2.0, 4.0, 9.0, 9.0]])
    alive = torch.tensor([[True] * 4, [True, True, False, False]])
    found = last_kept(logs, alive, torch.tensor([[1, 3, 4], [1, 2, 2]]))
    assert found.tolist() == [[7.0, 2.0, 0.0], [3.0, 1.0, 1.0]]


def test_budgets_are_drawn_as_often_as_they_are_liked():
    liked = torch.tensor([[[0.0, 1.0]], [[2.0, -30.0]]])
    found = drawn(liked, 4000, torch.Generator().manual_seed(0))
    assert found.shape == (2, 4000, 1) and (found[1] == 0).all()
    assert found[0].double().mean() == pytest.approx(torch.tensor(1.0).sigmoid().item(), abs=0.03)


def test_a_bandit_that_pays_for_keeping_learns_small_budgets_and_leaves_the_model_as_it_is():
    model, shares = recaller(BanditConfig(arms=ARMS, sinks=1, recent=0)), []
    before = {name: value.clone() for name, value in model.state_dict().items() if "scorer" not in name}
    how = RewardConfig(price=5.0, steps=60, rows=8, rollouts=4, learning_rate=2e-2)
    teach_budgets(model, TASK, how, protected=1, progress=lambda step, got, share: shares.append(share))
    assert shares[0] > 0.3 and sum(shares[-10:]) / 10 < 0.2
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_bandit_learns_to_give_more_to_inputs_that_need_more(monkeypatch):
    """Paid for coming near a share that the number of facts says; nothing else tells it to count them."""

    def worth(model, rows, context, keep, price, cost):
        share = keep.double().mean((0, -1)).float()
        return -((share - rows.difficulty / 4) ** 2), share

    monkeypatch.setattr(reward, "rewards", worth)
    model = recaller(BanditConfig(arms=ARMS, sinks=1, recent=0))
    teach_budgets(model, TASK, RewardConfig(steps=400, rows=16, entropy=0.02), protected=1)
    rows = TASK.batch("test", 0, 0, 64)
    with torch.no_grad():
        liked = preferences(bandits(model), read(model, rows.input_ids[:, :END])).softmax(-1)
    share = (liked * torch.tensor(ARMS)).sum(-1).mean(0)
    assert pearson(share, rows.difficulty) > 0.7


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: BanditConfig(arms=(0.5,)), "arms="),
        (lambda: BanditConfig(arms=(0.5, 0.25)), "rising"),
        (lambda: BanditConfig(arms=(0.0, 0.25)), "above 0"),
        (lambda: BanditConfig(arms=(0.5, 1.25)), "at most 1"),
        (lambda: BanditConfig(units=0), "units=0"),
        (lambda: BanditConfig(apart=True), "apart"),
        (lambda: teach_budgets(ctxprune.retrofit(small_model(), DenseConfig()), TASK, RewardConfig()), "BanditConfig"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(make, named):
    with pytest.raises(UserError, match=named) as caught:
        make()
    assert "\n" not in str(caught.value)
