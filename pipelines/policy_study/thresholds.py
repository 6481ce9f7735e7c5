"""Which threshold keeps a budget on average? The one that does on rows: looked for on few, found on all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ctxprune.policies.budget import Budget
from ctxprune.policies.dms import DMSScorer
from ctxprune.policies.rule import Rule
from ctxprune.retrofitting import wrappers
from ctxprune.tasks import Task
from ctxprune.tasks.task import Split
from pipelines.policy_study.measure import measure
from pipelines.policy_study.table import CLOSE

ROWS, FEW = 2048, 256
"""Rows that thresholds are set on, where nobody says how many, and those that say where to look."""
OFF = 0.03
"""Part of the budget that the mean of FEW rows may be off by, at an eighth of the context."""
MISSED = 0.002
"""Part of the budget that a threshold may leave unused on its rows."""
FARTHEST = 1e4
"""Thresholds beyond are not looked at."""
Kept = Callable[[float], float]
"""The share that a threshold keeps; falls as it rises."""


def meet(model, task: Task, share: float, rows: int | None = None) -> tuple[float, float]:
    """Leaves the model at thresholds that are set on validation rows; where these keep another share of the test rows,
    by more than CLOSE of it, set again on the test rows, as all ways are compared at equal bytes. Returns the share of
    the test rows that the first kept, and the share of questions that it answered."""
    settle(model, task, share, rows)
    rows = ROWS if rows is None else rows
    found = measure(model, task, min(rows, task.rows("test") or rows))
    kept, right = found.kept.mean().item(), found.right.mean().item()
    if abs(kept / share - 1) > CLOSE:
        settle(model, task, share, rows, "test")
    return kept, right


def settle(model, task: Task, share: float, rows: int | None = None, split: Split = "validation") -> None:
    """Set one threshold for all layers, on so many rows of the split (as far as there are), so that this share of the
    context is kept on average: at most MISSED of it less, never more. What is answered is not looked at. Where scores
    are tied no one threshold does (in the first layer they depend on the token alone, and go in groups): then the last
    layer takes a threshold of its own, as far as that goes.

    Where it is a parameter already, the offset of gates and of what decides when a key comes, it stays among the
    model's weights.
    """
    rules = [wrapper.rule for wrapper in wrappers(model)]
    start = [None if _offset(rule) is None else _offset(rule).detach().double().clone() for rule in rules]

    def kept(threshold: float, first: int, rows: int) -> float:
        for rule, at in list(zip(rules, start, strict=True))[first:]:
            if at is not None:
                with torch.no_grad():
                    _offset(rule).copy_(at - threshold)
            elif rule.ranking is not None:
                rule.ranking.config = replace(rule.ranking.config, budget=Budget(threshold=threshold))
        return measure(model, task, rows, split=split).kept.mean().item()

    model.eval()
    rows = ROWS if rows is None else rows
    rows = min(rows, task.rows(split) or rows)
    # Where the first one stops at a jump it need not be found to the last digit: the second makes up for that too.
    for first, turns in ((0, 18), (len(rules) - 1, 30)):
        low, high, _ = found(partial(kept, first=first, rows=min(FEW, rows)), share, -1.0, 1.0, turns, OFF)
        if found(partial(kept, first=first, rows=rows), share, low, high, turns, MISSED)[2]:
            return


def found(kept: Kept, share: float, low: float, high: float, turns: int, missed: float) -> tuple[float, float, bool]:
    """Leaves the model at the threshold that keeps the share, or at most the part `missed` of it less: thresholds OFF
    the share on both sides, and whether that is so. Where what is kept jumps over the share, the model is left just
    above the jump, and these are the two sides of it. low, high: where to look first."""
    low, above, high, below = _around(kept, share, low, high)
    for turn in range(turns):
        slope = (above - below) / (high - low)
        # A straight line between both sides mostly hits; where it does not, halves do.
        step = (above - share) / slope if turn % 2 == 0 and slope > 0 else 0.5 * (high - low)
        middle = low + min(max(step, 0.05 * (high - low)), 0.95 * (high - low))
        at = kept(middle)
        if (1.0 - missed) * share <= at <= share:
            aside = min(OFF * share / slope, high - low) if slope > 0 else high - low
            return middle - aside, middle + aside, True
        if at > share:
            low, above = middle, at
        else:
            high, below = middle, at
    kept(high)  # the side that keeps no more
    return low, high, False


def _around(kept: Kept, share: float, low: float, high: float) -> tuple[float, float, float, float]:
    """A threshold that keeps the share or more and what it keeps, and one that keeps it or less, farther and farther
    from these."""
    step = max(high - low, 1e-6)
    above, below = kept(low), kept(high)
    while above < share and low > -FARTHEST:
        low, step = low - step, 2 * step
        above = kept(low)
    while below > share and high < FARTHEST:
        high, step = high + step, 2 * step
        below = kept(high)
    return low, above, high, below


def _offset(rule: Rule) -> Tensor | None:
    """What lies between keeping and dropping, where that is a parameter."""
    if rule.gate is not None:
        return rule.gate.beta
    if rule.ranking is not None and isinstance(rule.ranking.scorer, DMSScorer):
        return rule.ranking.scorer.keep.bias
    return None
