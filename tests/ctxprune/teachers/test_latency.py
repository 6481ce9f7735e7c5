"""Is a table of latencies read as it says, and does an agent heed it? Nothing here asserts how long anything took."""

from __future__ import annotations

import pytest
import torch

import ctxprune
from ctxprune import UserError
from ctxprune.policies import AgentConfig, DenseConfig
from ctxprune.replay import read
from ctxprune.retrofitting import wrappers
from ctxprune.teachers import latency
from ctxprune.teachers.fit import networks, scores
from ctxprune.teachers.latency import LatencyTable, attention_ms, isotonic, measure
from ctxprune.teachers.reward import RewardConfig, reinforce
from tests.models import LAYERS, TASK, recaller, small_model

TABLE = LatencyTable(torch.tensor([1.0, 11.0, 21.0]), torch.tensor([[1.0, 2.0, 4.0], [3.0, 3.0, 3.0]]), 20)


def test_times_between_two_points_lie_between_theirs():
    found = TABLE.predict(torch.tensor([[1.0, 6.0, 11.0, 16.0, 21.0, 26.0]]).expand(2, -1))
    assert torch.allclose(found, torch.tensor([[1.0, 1.5, 2.0, 3.0, 4.0, 5.0], [3.0] * 6]))


def test_a_cost_is_a_share_of_what_all_keys_cost():
    """20 keys take 3.8 + 3 ms, 10 take 1.9 + 3: shares of the first layer cost, those of the second do not."""
    found = TABLE.cost(torch.tensor([[1.0, 0.5, 1.0], [1.0, 1.0, 0.1]]))
    assert torch.allclose(found, torch.tensor([1.0, 4.9 / 6.8, 1.0]))


def test_times_that_fall_are_levelled_and_others_left():
    assert isotonic([1.0, 2.0, 4.0]).tolist() == [1.0, 2.0, 4.0]
    assert isotonic([1.0, 4.0, 3.0, 2.0, 9.0]).tolist() == [1.0, 3.0, 3.0, 3.0, 9.0]
    assert isotonic([3.0, 1.0]).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("policy", [DenseConfig, AgentConfig])
def test_a_measured_table_can_be_read(policy):
    model = ctxprune.retrofit(small_model(), policy())
    table = measure(model, 40, rows=2, repeats=1)
    assert table.keys.tolist() == [1, 5, 10, 20, 30, 40] and table.ms.shape == (LAYERS, 6) and (table.ms > 0).all()
    assert table.cost(torch.ones(LAYERS, 3)).tolist() == pytest.approx([1.0] * 3)
    assert attention_ms(model, torch.tensor([[[3, 7]] * LAYERS] * 2), repeats=1).shape == (2, LAYERS)


def test_pages_hold_as_many_keys_as_they_are_timed_for_however_often():
    """A token that stayed would make every later one dearer."""
    seen, held = read(ctxprune.retrofit(small_model(), DenseConfig()), torch.zeros(1, 2, dtype=torch.long)), [3, 40, 17]
    step = latency._Step.of(seen.queries[0], seen.keys[0], torch.tensor(held))
    for _ in range(3):
        step.ms()
        assert step.layer.pages.live(torch.full((3,), step.next)).tolist() == held
    assert (step.layer.pages.refused == 0).all()


def test_an_agent_keeps_where_time_is_cheap():
    """Untrained, the model answers by chance: only time is left to learn from, and it passes in the second layer."""
    model, n = recaller(AgentConfig(sinks=1, recent=0)), TASK.length
    table = LatencyTable(torch.tensor([1.0, float(n)]), torch.tensor([[1e-6, 1e-6], [0.0, 1.0]]), n)
    how = RewardConfig(price=5.0, steps=80, rows=8, rollouts=4, learning_rate=2e-2)
    reinforce(model, TASK, how, cost=table.cost, protected=1)
    context = read(model, TASK.batch("test", 0, 0, 8).input_ids[:, :n])
    with torch.no_grad():
        first, second = (odds.sigmoid().mean() for odds in scores(model, context))
    assert len(networks(model)) == len(wrappers(model)) == 2 and second < 0.4 and first > second + 0.2


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: LatencyTable(torch.tensor([2.0, 1.0]), torch.ones(1, 2), 8), "give at least 2, rising"),
        (lambda: LatencyTable(torch.tensor([1.0]), torch.ones(1, 1), 8), "give at least 2, rising"),
        (lambda: LatencyTable(torch.tensor([1.0, 2.0]), torch.tensor([[2.0, 1.0]]), 8), "times fall"),
        (lambda: LatencyTable(torch.tensor([1.0, 2.0]), torch.zeros(1, 2), 8), "or are none"),
        (lambda: measure(ctxprune.retrofit(small_model(), DenseConfig()), 7), "length is 7"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(make, named):
    with pytest.raises(UserError, match=named) as caught:
        make()
    assert "\n" not in str(caught.value)
