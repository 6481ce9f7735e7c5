"""Which ways to prune are taught by reward, and what do they say of it afterwards? Agents over tokens, a bandit over
budgets; each stops after so many seconds where that is asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ctxprune.policies import POLICIES, PolicyConfig
from ctxprune.policies.budget import Budget
from ctxprune.retrofitting import wrappers
from ctxprune.tasks import Task
from ctxprune.teachers.bandit import teach_budgets
from ctxprune.teachers.latency import LatencyTable, attention_ms, measure
from ctxprune.teachers.reward import RewardConfig, reinforce
from pipelines.policy_study.measure import alive, passed

Report = Callable[[object, Task], dict[str, float]]
"""What there is to say of a model that has been taught and whose budget is set."""
ARMS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Budgets that the bandit chooses from, as multiples of the mean that is asked for."""
ENTROPY = 0.02
"""What it is paid for being undecided, in shares of right answers per nat."""
ROWS = 16
"""Contexts whose attention is timed together."""


def agent(model, task: Task, share: float, seed: int, seconds: float | None) -> None:
    """Keep or drop each token; every key costs the same."""
    sinks, recent = _protected(model)
    reinforce(model, task, _lessons(share, seed, seconds), protected=sinks, recent=recent)


def agent_by_latency(model, task: Task, share: float, seed: int, seconds: float | None) -> Report:
    """Keep or drop each token; what is kept costs the time that attention to it took when it was measured, first."""
    table = measure(model, task.batch("validation", seed, 0, 1).end, rows=ROWS)
    sinks, recent = _protected(model)
    reinforce(model, task, _lessons(share, seed, seconds), cost=table.cost, protected=sinks, recent=recent)
    return lambda taught, task: times(taught, task, table)


def bandit(model, task: Task, share: float, seed: int, seconds: float | None) -> None:
    """Choose one of a few budgets."""
    sinks, recent = _protected(model)
    how = RewardConfig(price=0.1, target=share, entropy=ENTROPY, steps=1000, seed=seed, seconds=seconds)
    teach_budgets(model, task, how, protected=sinks, recent=recent)


def budgets(sinks: int, recent: int) -> Callable[[float], PolicyConfig]:
    """The bandit's policy by the mean share that is asked for."""

    def policy(share: float) -> PolicyConfig:
        arms = tuple(sorted({min(1.0, factor * share) for factor in ARMS}))
        return POLICIES["bandit"](sinks=sinks, recent=recent, arms=arms, budget=Budget(threshold=0.0))

    return policy


@torch.no_grad()
def times(model, task: Task, table: LatencyTable) -> dict[str, float]:
    """ms of the attention of one token over test contexts, all layers: by the table, on the clock now, and by the table
    if all were kept."""
    rows = task.batch("test", 0, 0, ROWS)
    taken, _ = passed(model, rows)
    kept = alive(taken, rows).sum(-1).double().mean(-1)
    whole = torch.full((len(kept), 1), float(rows.end))  # texts: not the length that was measured
    return {
        "attention_ms_predicted": table.predict(kept).mean(1).sum().item(),
        "attention_ms": attention_ms(model, kept.round().long()[None]).sum().item(),
        "attention_ms_dense": table.predict(whole).sum().item(),
    }


def _lessons(share: float, seed: int, seconds: float | None) -> RewardConfig:
    # A little below: what is over is given back when the threshold is settled.
    return RewardConfig(price=0.1, target=0.9 * share, steps=1000, seed=seed, seconds=seconds)


def _protected(model) -> tuple[int, int]:
    """First and last tokens of a context that the model's policy never drops."""
    ranking = wrappers(model)[0].rule.ranking
    assert ranking is not None, "what reward teaches ranks keys"
    return ranking.config.sinks, ranking.config.recent
