"""Is the threshold that keeps a budget found, in few measurements, wherever it lies and whatever jumps there?"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

import ctxprune
from ctxprune import tasks
from pipelines.policy_study import small_model, thresholds
from pipelines.policy_study.measure import measure
from pipelines.policy_study.methods import named
from pipelines.policy_study.thresholds import FARTHEST, MISSED, OFF, found, meet, settle


class Falling:
    """The share that a threshold keeps, and where it was asked for."""

    def __init__(self, root: float, slope: float = 4.0, steps: int = 0, above: float = 0.0):
        """root: keeps half. steps: in how many equal steps it falls; 0: smoothly. above: what is kept in any case."""
        self.root, self.slope, self.steps, self.above, self.asked = root, slope, steps, above, []

    def __call__(self, threshold: float) -> float:
        self.asked.append(threshold)
        kept = 0.5 - 0.5 * math.tanh(self.slope * (threshold - self.root))
        if self.steps:
            kept = round(kept * self.steps) / self.steps
        return max(self.above, kept)


@pytest.mark.parametrize("root", [0.0, -0.7, 3.0, -900.0, 40.0])
@pytest.mark.parametrize("slope", [0.1, 4.0, 100.0])
@pytest.mark.parametrize("share", [0.125, 0.25, 0.5])
def test_it_is_found_wherever_it_lies(root, slope, share):
    kept = Falling(root, slope)
    low, high, hit = found(kept, share, -1.0, 1.0, 40, MISSED)
    assert hit and (1 - MISSED) * share <= kept(kept.asked[-1]) <= share
    assert low < kept.asked[-1] < high and kept(low) > share > kept(high)


@pytest.mark.parametrize("off", [-0.02, 0.0, 0.02])
def test_who_has_looked_on_few_rows_asks_for_all_of_them_seldom(off):
    """A part of the share more or less, and the root is elsewhere on all rows than on few."""
    few, share = Falling(0.3), 0.25
    low, high, hit = found(few, share * (1 + off), -1.0, 1.0, 18, OFF)
    assert hit and len(few.asked) <= 8
    everything = Falling(0.3)
    assert found(everything, share, low, high, 18, MISSED)[2]
    assert len(everything.asked) <= 6


def test_at_a_jump_less_is_kept_and_it_is_said():
    kept = Falling(0.0, steps=3)  # keeps 0, 1/3, 2/3 or all
    low, high, hit = found(kept, 0.5, -1.0, 1.0, 30, MISSED)
    assert not hit and kept(low) == pytest.approx(2 / 3) and kept(high) == pytest.approx(1 / 3)
    assert kept.asked[-3] == high and high - low < 1e-3


def test_where_nothing_keeps_so_little_the_search_ends():
    kept = Falling(0.0, above=0.4)
    assert not found(kept, 0.25, -1.0, 1.0, 18, MISSED)[2]
    assert max(kept.asked) < 4 * FARTHEST and len(kept.asked) < 60


@dataclass(frozen=True)
class Drifting(tasks.RecallConfig):
    """Facts that become rarer between the rows that thresholds are set on and those that are measured."""

    def batch(self, split, seed, index, size):
        plain = tasks.RecallConfig(length=32, fewest=1, facts=4, decoys=0, keys=8, values=8, fillers=8)
        return (replace(plain, facts=1) if split == "test" else plain).batch(split, seed, index, size)


STEADY = tasks.RecallConfig(length=32, facts=3, decoys=2, keys=8, values=8, fillers=8)
DRIFTING = Drifting(length=32, facts=4, decoys=0, keys=8, values=8, fillers=8)


FEWER = 0.05
"""Part of the budget that a mean of 128 rows may be off by here, where nothing drifts; what drifts does by more."""


def pruned(task):
    """By an agent that nobody taught: what a token is worth follows what it is."""
    torch.manual_seed(0)
    model = small_model.build(task.vocab_size, small_model.Shape(), 0).eval()
    return ctxprune.retrofit(model, named(["agent"])[0].policy(0.25))


def share_of(model, task, split: str) -> float:
    return measure(model, task, thresholds.ROWS, split=split).kept.mean().item()


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(thresholds, "ROWS", 128)
    monkeypatch.setattr(thresholds, "CLOSE", FEWER)


def test_thresholds_of_other_rows_than_are_measured_are_set_again_and_it_is_told_what_they_kept(few):
    model = pruned(DRIFTING)
    foreseen, _ = meet(model, DRIFTING, 0.25)
    assert abs(share_of(model, DRIFTING, "test") / 0.25 - 1) <= FEWER
    twin = pruned(DRIFTING)
    settle(twin, DRIFTING, 0.25)
    assert share_of(twin, DRIFTING, "test") == foreseen and abs(foreseen / 0.25 - 1) > FEWER


def test_thresholds_that_hold_on_the_measured_rows_stay_those_of_the_validation_rows(few):
    model, twin = pruned(STEADY), pruned(STEADY)
    foreseen, right = meet(model, STEADY, 0.25)
    settle(twin, STEADY, 0.25)
    assert abs(foreseen / 0.25 - 1) <= FEWER and share_of(model, STEADY, "test") == foreseen
    assert right == measure(model, STEADY, thresholds.ROWS).right.mean()
    for split in ("validation", "test"):
        assert share_of(model, STEADY, split) == share_of(twin, STEADY, split)
