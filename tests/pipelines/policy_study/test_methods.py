"""Is each way what the table says of it? Lots of their own, times of what is decided."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch

import ctxprune
from ctxprune import tasks
from ctxprune.drop_time import drop_times
from ctxprune.policies import GateConfig, H2OConfig
from pipelines.policy_study import clock, small_model
from pipelines.policy_study.methods import named, retrofitted

TASK = tasks.RecallConfig(length=32, facts=3, decoys=2, keys=8, values=8, fillers=8)


def model():
    return small_model.build(TASK.vocab_size, small_model.Shape(), 0).eval()


def test_each_small_model_draws_lots_of_its_own():
    rows, (random,) = TASK.batch("test", 0, 0, 4), named(["random"])
    taken = [
        drop_times(retrofitted(random, model(), TASK, 0.25, seed), rows.input_ids, prompt=torch.full((4,), rows.end))
        for seed in (0, 1, 0)
    ]
    first, other, again = ((one.drop_time[..., : rows.end] > rows.end).double() for one in taken)
    assert torch.equal(first, again) and first.mean() == pytest.approx(other.mean().item())
    assert 0.15 < (first * other).sum() / first.sum() < 0.4  # as many of one's keys among the other's as by chance


def test_what_gates_decide_is_not_said_to_take_no_time():
    one, dense = ({"read_ms": ms, "token_ms": ms, "deciding_ms": 0.0} for ms in (2.0, 1.0))
    for config, said in ((GateConfig(rank=4), None), (H2OConfig(), 0.0)):
        found = clock._beside(one, dense, ctxprune.retrofit(model(), config))
        assert found["deciding_ms"] == said and found["read_of_dense"] == 2.0


def test_scores_that_a_batch_brings_with_it_are_decided_before_it_is_read():
    def around(model, rows):
        time.sleep(0.05)
        return nullcontext()

    pruned = ctxprune.retrofit(model(), H2OConfig())
    assert clock._once(pruned, TASK.batch("test", 0, 0, 2), around)["deciding_ms"] >= 50
