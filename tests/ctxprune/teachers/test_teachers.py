"""Do teachers say what keys are worth, and do networks and agents learn it?

On untrained models: what trained ones make of it is in the study of policies.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ctxprune
from ctxprune import UserError
from ctxprune.policies import AgentConfig, BanditConfig, DenseConfig, DMSConfig, FutureConfig, LTPConfig
from ctxprune.policies.budget import Budget
from ctxprune.replay import read, resume
from ctxprune.retrofitting import wrappers
from ctxprune.tasks.scoring import spearman
from ctxprune.tasks.task import TaskBatch
from ctxprune.teachers import reward, soft_mask
from ctxprune.teachers.bandit import teach_budgets
from ctxprune.teachers.dms import DMSTraining, learn_to_evict
from ctxprune.teachers.edge_gradient import edge_gradients, left_out
from ctxprune.teachers.fit import fit, networks, scores
from ctxprune.teachers.future_attention import future_attention
from ctxprune.teachers.reward import RewardConfig, reinforce, rewards
from ctxprune.teachers.soft_mask import SoftMaskConfig, soften, softened
from tests.models import LAYERS, TASK, recaller, small_model, tokens

CONTEXT, N = 20, 26


def small(config):
    return ctxprune.retrofit(small_model(), config)


def test_future_attention_is_the_attention_of_what_follows():
    model, ids = small(DenseConfig()).double(), tokens(2, N)
    context = read(model, ids[:, :CONTEXT])
    got = future_attention(model, context, ids[:, CONTEXT:])
    plain = small_model().double()
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        shares = plain(ids, output_attentions=True).attentions
    asked = torch.zeros(2, N - CONTEXT, dtype=torch.bool)
    asked[0, 1] = asked[1, 3] = True
    some = future_attention(model, context, ids[:, CONTEXT:], asked)
    for layer in range(LAYERS):
        mass = shares[layer][:, :, CONTEXT:, :CONTEXT].mean(1)
        assert torch.allclose(got[layer], mass.sum(1), atol=1e-12)
        assert torch.allclose(some[layer], torch.stack([mass[0, 1], mass[1, 3]]), atol=1e-12)


def test_gradients_stand_for_leaving_single_keys_out():
    """Exactly for small changes: where attention is nearly even no key weighs much: first order is the truth."""
    model = small(DenseConfig()).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.mul_(0.05)
    ids = tokens(4, 60)
    context, follows = read(model, ids[:, :50]), ids[:, 50:]
    asked = torch.zeros_like(follows, dtype=torch.bool)
    asked[:, -1] = True
    signed = edge_gradients(model, context, follows, asked, signed=True)
    for layer in range(LAYERS):
        truth = left_out(model, context, follows, layer, torch.arange(50), asked)
        for row in range(4):
            assert spearman(signed[layer, row], truth[row]) > 0.95
    positive = edge_gradients(model, context, follows, asked)
    assert (positive >= 0).all() and (positive >= signed - 1e-12).all()


def test_an_edge_that_has_all_the_attention_is_worth_what_its_head_loses_without_it():
    """A gradient with respect to the logit is zero there: it saturates where the key matters most."""
    model = small(DenseConfig()).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Sharp attention, and so little of it in the residual stream that the first order is the truth.
            parameter.mul_(20.0 if "q_proj" in name else 1e-4 if "o_proj" in name else 1.0)
    ids = tokens(2, 40)
    context, follows = read(model, ids[:, :30]), ids[:, 30:]
    asked = torch.zeros_like(follows, dtype=torch.bool)
    asked[:, -1] = True
    found = edge_gradients(model, context, follows, asked, signed=True)
    for layer in range(LAYERS):
        truth = left_out(model, context, follows, layer, torch.arange(30), asked)
        first = truth.abs().argmax(1, keepdim=True)
        assert torch.allclose(found[layer].gather(1, first), truth.gather(1, first), rtol=0.05)


def test_gradients_leave_no_trace_in_the_model():
    model, ids = small(DenseConfig()), tokens(1, N)
    edge_gradients(model, read(model, ids[:, :CONTEXT]), ids[:, CONTEXT:])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_networks_learn_to_rank_like_their_teacher():
    """The teacher prefers some tokens for what they are: a network that reads hidden states can."""
    model = small(FutureConfig(Budget(share=0.5)))
    favourite = torch.rand(97, generator=torch.Generator().manual_seed(1))

    def lessons():
        for step in range(150):
            context = read(model, tokens(8, CONTEXT, seed=step))
            yield context, favourite[context.ids].expand(LAYERS, -1, -1)

    before = {name: value.clone() for name, value in model.state_dict().items() if "scorer" not in name}
    losses = []
    fit(model, lessons(), learning_rate=1e-2, progress=lambda step, loss: losses.append(loss))
    context = read(model, tokens(1, 60, seed=999))
    with torch.no_grad():
        assert spearman(scores(model, context)[0][0], favourite[context.ids[0]]) > 0.9
    assert losses[-1] < losses[0] and len(losses) == 150
    # The language model is as it was.
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_reward_is_what_is_right_less_what_is_kept():
    model, rows = recaller(AgentConfig()), TASK.batch("train", 0, 0, 3)
    end = int(rows.context_end[0])
    context = read(model, rows.input_ids[:, :end])
    keep = torch.rand(2, 5, 3, end, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[:, 0] = True
    with torch.no_grad():
        said = resume(model, context, rows.input_ids[:, end:], [None, None])
    right = ((said.argmax(-1) == rows.answers[:, end:]) & (rows.questions[:, end:] >= 0)).sum(1)
    right = right / (rows.questions.amax(1) + 1)
    got, share = rewards(model, rows, context, keep, 0.5, lambda shares: shares.mean(0))
    assert torch.allclose(got[0], right - 0.5) and torch.allclose(share[0], torch.ones(3))
    assert torch.allclose(share, keep.double().mean((0, -1)).float())


def test_an_agent_that_pays_for_keeping_learns_to_drop_and_one_that_does_not_keeps():
    """Untrained, the model answers by chance: only the price is left to learn from."""
    kept = {}
    for price in (0.0, 5.0):
        model, shares = recaller(AgentConfig(sinks=1, recent=0)), []
        how = RewardConfig(price=price, steps=40, rows=8, rollouts=4, learning_rate=2e-2)
        reinforce(model, TASK, how, protected=1, progress=lambda step, reward, share, to=shares: to.append(share))
        kept[price] = shares[-1]
    assert kept[5.0] < 0.3 < 0.5 < kept[0.0]


def test_what_is_protected_is_never_tried_without(monkeypatch):
    """Neither by an agent nor under a soft mask."""
    tried, biases = [], []
    monkeypatch.setattr(
        reward,
        "rewards",
        lambda model, rows, context, keep, price, cost: tried.append(keep) or (torch.rand(4, 8), torch.rand(4, 8)),
    )
    how = RewardConfig(price=5.0, steps=3, rows=8, rollouts=4)
    reinforce(recaller(AgentConfig(sinks=1, recent=2)), TASK, how, protected=1, recent=2)
    assert all(keep[..., [0, -1, -2]].all() and not keep[..., 1:-2].all() for keep in tried) and len(tried) == 3
    resumed = soft_mask.resume
    monkeypatch.setattr(
        soft_mask, "resume", lambda model, context, ids, bias: biases.extend(bias) or resumed(model, context, ids, bias)
    )
    soften(recaller(LTPConfig(sinks=1, recent=2)), TASK, SoftMaskConfig(steps=1, rows=2), protected=1, recent=2)
    for bias in biases:
        assert not bias[..., [0, -1, -2]].any() and (bias[..., 1:-2] < 0).all()


def test_a_target_is_met_by_moving_the_price(monkeypatch):
    """Where every key more is worth a little less than the one before, each price has a share of its own."""

    def worth(model, rows, context, keep, price, cost):
        share = keep.double().mean((0, -1)).float()
        return 2 * share - share**2 - price * share, share

    monkeypatch.setattr(reward, "rewards", worth)
    model, shares = recaller(AgentConfig(sinks=1, recent=0)), []
    how = RewardConfig(price=0.2, target=0.4, steps=400, rows=8, rollouts=8, learning_rate=1e-2)
    reinforce(model, TASK, how, protected=1, progress=lambda step, reward, share: shares.append(share))
    assert sum(shares[-100:]) / 100 == pytest.approx(0.4, abs=0.08)


def test_learning_stops_after_its_seconds_and_is_until_then_what_it_would_be_without(monkeypatch):
    def learned(**limit):
        clock = iter(range(100))
        monkeypatch.setattr(reward, "monotonic", lambda: next(clock))
        model, steps = recaller(AgentConfig(sinks=1, recent=0)), []
        how = RewardConfig(rows=2, rollouts=2, **limit)
        reinforce(model, TASK, how, progress=lambda step, got, share: steps.append((step, got, share)))
        return steps

    # The clock is read when learning begins and after each step.
    assert learned(steps=9, seconds=3.0) == learned(steps=3) and len(learned(steps=2, seconds=3.0)) == 2


@pytest.mark.parametrize("config", [LTPConfig(sinks=1, recent=0), FutureConfig(sinks=1, recent=0)], ids=["ltp", "net"])
def test_a_soft_mask_closes_until_its_share_is_kept(config):
    model, shares = recaller(config), []
    before = {name: value.clone() for name, value in model.state_dict().items() if "scorer" not in name}
    how = SoftMaskConfig(target=0.4, steps=200, rows=8, learning_rate=0.03)
    soften(model, TASK, how, protected=1, progress=lambda step, lost, share: shares.append(share))
    assert sum(shares[-50:]) / 50 == pytest.approx(0.4, abs=0.1)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_softened_scores_are_those_that_the_layers_rank_by():
    model = recaller(LTPConfig(Budget(share=0.5), sinks=0, recent=0)).double()
    ids = TASK.batch("train", 0, 0, 3).input_ids[:, :24]
    with torch.no_grad():
        found = softened([wrapper.rule.ranking.scorer for wrapper in wrappers(model)], read(model, ids))
    taken = ctxprune.drop_times(model, torch.cat([ids, ids[:, :1]], 1), prompt=torch.full((3,), 24)).drop_time
    for layer in range(2):
        kept = taken[layer, :, :24] > 24
        for row in range(3):
            assert found[layer][row][kept[row]].min() >= found[layer][row][~kept[row]].max()


def test_twin_without_a_baseline_of_its_own_an_input_teaches_less(monkeypatch):
    """Leave-one-out makes the advantages of one input sum to zero: what all its rollouts share teaches nothing."""
    seen = []
    original = reward.rewards
    monkeypatch.setattr(reward, "rewards", lambda *given: seen.append(original(*given)) or seen[-1])
    model = recaller(AgentConfig())
    reinforce(model, TASK, RewardConfig(steps=1, rows=4, rollouts=8))
    got, _ = seen[0]
    advantage = (got - got.mean(0)) * 8 / 7
    alone = torch.stack([got[i] - torch.cat([got[:i], got[i + 1 :]]).mean(0) for i in range(8)])
    assert torch.allclose(advantage, alone, atol=1e-6) and advantage.sum(0).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: RewardConfig(rollouts=1), "rollouts is 1"),
        (lambda: RewardConfig(steps=0), "steps is 0"),
        (lambda: RewardConfig(entropy=-0.1), "entropy is -0.1"),
        (lambda: RewardConfig(seconds=0.0), "seconds is 0.0"),
        (lambda: RewardConfig(price=-1.0), "price is -1"),
        (lambda: RewardConfig(price=float("nan")), "price is nan"),
        (lambda: RewardConfig(target=1.0), "target is 1.0"),
        (lambda: SoftMaskConfig(target=0.0), "target is 0.0"),
        (lambda: SoftMaskConfig(temperature=0.0), "temperature is 0.0"),
        (lambda: SoftMaskConfig(rows=0), "rows is 0"),
        (lambda: soften(small(DenseConfig()), TASK, SoftMaskConfig()), "soft mask teaches"),
        (lambda: FutureConfig(units=0), "units=0"),
        (lambda: FutureConfig(apart=True), "apart"),
        (lambda: networks(small(DenseConfig())), "no network to teach"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(make, named):
    with pytest.raises(UserError, match=named) as caught:
        make()
    assert "\n" not in str(caught.value)


class Padded(type(TASK)):
    """With a token of padding before one row."""

    def batch(self, *which) -> TaskBatch:
        rows = super().batch(*which)
        there = torch.ones_like(rows.input_ids)
        there[0, 0] = 0
        return replace(rows, attention_mask=there)


TEACHERS = {
    "soft mask": (LTPConfig(), lambda model, task: soften(model, task, SoftMaskConfig(steps=1, rows=2))),
    "reward": (AgentConfig(), lambda model, task: reinforce(model, task, RewardConfig(steps=1, rows=2))),
    "budgets": (BanditConfig(), lambda model, task: teach_budgets(model, task, RewardConfig(steps=1, rows=2))),
}
COARSE = TEACHERS | {
    "fit": (FutureConfig(), lambda model, task: fit(model, [])),
    "DMS": (DMSConfig(), lambda model, task: learn_to_evict(model, task, DMSTraining(steps=1, rows=2))),
}


@pytest.mark.parametrize("config, teach", TEACHERS.values(), ids=TEACHERS)
def test_padding_is_not_read_as_text(config, teach):
    with pytest.raises(UserError, match="padded"):
        teach(recaller(config), Padded(**vars(TASK)))


@pytest.mark.parametrize("config, teach", COARSE.values(), ids=COARSE)
def test_numbers_too_coarse_to_move_are_not_taught(config, teach):
    with pytest.raises(UserError, match=r"bfloat16.*model\.float\(\)"):
        teach(recaller(config).bfloat16(), TASK)


def test_gradients_of_edges_are_computed_in_float32_where_a_model_is_in_16_bits():
    exact, model = small(DenseConfig()), small(DenseConfig()).bfloat16()
    ids = tokens(2, N)
    found, wanted = (
        edge_gradients(one, read(one, ids[:, :CONTEXT]), ids[:, CONTEXT:], signed=True) for one in (model, exact)
    )
    assert found.dtype == torch.float32
    assert spearman(found[0, 0], wanted[0, 0]) > 0.9
