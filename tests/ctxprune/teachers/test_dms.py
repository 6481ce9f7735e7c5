"""Do heads decide when a key comes, does it live exactly as long as the delay says, and do they learn?"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import ctxprune
from ctxprune import UserError
from ctxprune.drop_time import forward_with_drop_times
from ctxprune.generation.prompts import page_bytes
from ctxprune.policies import DMSConfig, FutureConfig, H2OConfig, RandomConfig
from ctxprune.policies.budget import Budget
from ctxprune.retrofitting import gate_parameters, state_of, wrappers
from ctxprune.tasks.recall import RecallConfig
from ctxprune.tasks.task import TaskBatch
from ctxprune.teachers.dms import DMSTraining, learn_to_evict, rankings, relaxed
from pipelines.policy_study import small_model as study
from pipelines.policy_study.measure import alive, measure
from tests.models import LAYERS, small_model, tokens

N, DELAY, SINKS, KV_HEADS = 24, 3, 2, 2
CONFIG = DMSConfig(sinks=SINKS, recent=DELAY)
TASK = RecallConfig(length=20, fewest=1, facts=3, decoys=1, keys=8, values=8, fillers=8)


def model_of(config=CONFIG, std: float = 0.0):
    """A small model; with `std` its decisions depend on the token and as often fall one way as the other."""
    model = ctxprune.retrofit(small_model(), config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for wrapper in wrappers(model):
            keep = wrapper.rule.ranking.scorer.keep
            if std:
                keep.weight.copy_(torch.randn(keep.weight.shape, generator=generator) * std)
                keep.bias.zero_()
    return model


def rows_of(ids: torch.Tensor, padded: int = 0) -> TaskBatch:
    """Rows that answer at their last three tokens, the first one with padding on its left."""
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    answers = torch.full_like(ids, -100)
    answers[:, -3:] = ids[:, -3:]
    end = torch.full((len(ids),), N - 6)
    return TaskBatch(ids, answers, answers.clamp(max=0), end, mask if padded else None)


def test_at_the_start_everything_is_kept():
    ids = tokens(2, N)
    with torch.no_grad():
        wanted = small_model().double()(ids).logits
    taken, said = forward_with_drop_times(model_of(), ids)
    assert (taken.drop_time >= N).all() and torch.equal(said, wanted)


def test_an_evicted_key_is_seen_by_as_many_later_queries_as_the_delay_says_and_by_one_head_only():
    model = model_of()
    with torch.no_grad():
        for wrapper in wrappers(model):
            wrapper.rule.ranking.scorer.keep.bias.copy_(torch.tensor([-0.1, 0.1]))
    times = ctxprune.drop_times(model, tokens(2, N))
    assert times.drop_time.shape == (LAYERS, 2, KV_HEADS, N)
    column = torch.arange(SINKS, N)
    assert (times.drop_time[:, :, 0, SINKS:] == (column + 1 + DELAY).clamp(max=N)).all()
    assert (times.drop_time[:, :, 0, :SINKS] >= N).all() and (times.drop_time[:, :, 1] >= N).all()
    seeing = torch.stack([times.live(query) for query in range(N)]).sum(0)
    assert (seeing[:, :, 0, SINKS : N - DELAY] == 1 + DELAY).all()


def test_no_later_token_has_a_say():
    model, ids, first = model_of(std=0.3), tokens(2, N), torch.arange(N // 2)
    # Those that have both gone by the end of the shorter text.
    whole, part = (
        ctxprune.drop_times(model, ids[:, :n]).drop_time[..., : N // 2] == first + 1 + DELAY
        for n in (N, N // 2 + DELAY + 1)
    )
    assert torch.equal(whole, part) and whole.any() and (whole[:, :, 0] != whole[:, :, 1]).any()


def test_one_decision_for_all_heads_where_they_do_not_decide_apart():
    assert (
        ctxprune.drop_times(model_of(dataclasses.replace(CONFIG, apart=False), 0.3), tokens(1, N)).drop_time.ndim == 3
    )


def test_a_cache_keeps_nothing_beside_keys_whose_fate_is_known():
    """Marks and the search for older keys are for policies that ask again."""
    model, held = model_of(std=0.3), ctxprune.PrunedCache(page=16)
    with torch.no_grad():
        model(tokens(1, N), past_key_values=held, use_cache=True)
    assert all(layer.marks is None and layer.bytes_per_token() == 2 * 8 * 8 for layer in held.held)
    # A page of float64 keys and values and of three integers for each of the heads.
    assert page_bytes(model, 16) == KV_HEADS * 16 * (2 * 8 * 8 + 3 * 4)


def test_gradients_reach_the_decisions_of_every_head_and_the_model():
    model = model_of(std=0.3)
    said, kept = relaxed(model, rows_of(tokens(2, N)), 0.3, torch.Generator().manual_seed(0))
    (said.logsumexp(-1).mean() + 0.0 * kept).backward()
    for parameter in gate_parameters(model):
        assert (parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad[:, None]).abs().sum(1).gt(0).all()
    model.zero_grad()
    relaxed(model, rows_of(tokens(2, N)), 0.3, torch.Generator().manual_seed(0))[1].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in gate_parameters(model))
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("padded", [0, 4])
@pytest.mark.parametrize("apart", [True, False])
def test_relaxed_decisions_become_the_hard_ones_when_they_are_sharp(padded, apart):
    """The same logits and the same share as under drop times: delay, sinks, padding and heads included."""
    model, rows = model_of(dataclasses.replace(CONFIG, apart=apart), std=0.3), rows_of(tokens(3, N), padded)
    with torch.no_grad():
        said, kept = relaxed(model, rows, 1e-9, None)
        taken, wanted = forward_with_drop_times(model, rows.input_ids, attention_mask=rows.attention_mask)
    real = torch.ones_like(rows.input_ids).bool() if rows.attention_mask is None else rows.attention_mask.bool()
    assert torch.allclose(said[real], wanted[real], atol=1e-9)
    left = alive(taken, rows)
    total = (rows.context_end - torch.tensor([padded, 0, 0])).sum()
    assert kept.item() == pytest.approx((left.sum() / (left.shape[0] * left.shape[2] * total)).item(), abs=1e-6)
    assert 0.3 < kept < 0.9


def test_the_share_that_costs_nothing_falls_linearly_to_the_target_and_stays():
    how = DMSTraining(target=0.2, annealed=0.5)
    assert [how.allowed(done) for done in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


@pytest.fixture(scope="module")
def recaller():
    """A small model that knows its task."""
    return study.train(TASK, steps=300)


def test_heads_learn_to_keep_their_share_and_what_is_asked_for(recaller):
    model, seen = ctxprune.retrofit(copy.deepcopy(recaller), DMSConfig(sinks=1, recent=2)), []
    how = DMSTraining(target=0.5, steps=200, scorer_learning_rate=5e-2)
    learn_to_evict(model, TASK, how, progress=lambda step, lost, kept: seen.append(kept))
    found = measure(model, TASK, 128)
    assert seen[0] > 0.95 and found.kept.mean() < 0.6 and not model.training
    by_lot = ctxprune.retrofit(copy.deepcopy(recaller), RandomConfig(Budget(share=0.6), sinks=1, recent=2))
    assert found.right.mean() > measure(by_lot, TASK, 128).right.mean() + 0.1


def test_a_model_that_is_not_to_change_does_not(recaller):
    model = ctxprune.retrofit(copy.deepcopy(recaller), DMSConfig(sinks=1, recent=2))
    before = copy.deepcopy(model.state_dict())
    learn_to_evict(model, TASK, DMSTraining(steps=3, rows=4, learning_rate=0.0))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("scorer" in name for name in changed)
    assert state_of(model).replay is None and not any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: DMSTraining(target=1.0), "target is 1.0"),
        (lambda: DMSTraining(annealed=0.0), "annealed is 0.0"),
        (lambda: DMSTraining(distillation=1.5), "distillation is 1.5"),
        (lambda: DMSTraining(price=0.0), "price is 0.0"),
        (lambda: DMSTraining(temperature=0.0), "temperature is 0.0"),
        (lambda: DMSTraining(scorer_learning_rate=0.0), "scorer_learning_rate is 0.0"),
        (lambda: DMSTraining(learning_rate=-1.0), "learning_rate is -1"),
        (lambda: DMSTraining(learning_rate=float("nan")), "learning_rate is nan"),
        (lambda: DMSTraining(rows=0), "rows is 0"),
        (lambda: rankings(ctxprune.retrofit(small_model(), FutureConfig())), "delayed eviction"),
        (lambda: rankings(ctxprune.retrofit(small_model(), DMSConfig(when="prompt"))), "delayed eviction"),
        (lambda: DMSConfig(budget=Budget(mass=0.5)), "a budget of mass"),
        (lambda: H2OConfig(Budget(threshold=0.1), when="step"), "a threshold on scores that change"),
        (lambda: DMSConfig(keep_prompt=True), "keep_prompt"),
        (lambda: DMSConfig(recent=-1), "recent=-1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(make, named):
    with pytest.raises(UserError, match=named) as caught:
        make()
    assert "\n" not in str(caught.value)
