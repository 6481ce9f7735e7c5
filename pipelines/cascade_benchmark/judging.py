"""Was the promise kept? Thresholds from each draw of calibration questions, held against the same unseen ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ctxprune.generation.cascade import Stage, answered, calibrated, lower_limit, upper_limit
from pipelines.cascade_benchmark.asking import Asked

Record = dict[str, Any]
CERTAINTY = 0.95
"""Of the limits that are reported, and of the verdict over all draws."""


def judge(
    calibration: Asked, test: Asked, budgets: tuple[int, int], draws: int, *, risk: float, confidence: float
) -> Record:
    """One cascade, calibrated on each of `draws` disjoint parts of the calibration questions: the means over them, and
    how many broke the promise. That is over the drawing of the calibration questions, so some may: the promise counts
    as broken where more did than chance explains."""
    size, judged = len(calibration.truth) // draws, len(test.truth)
    small = {budget: test.small[budget] for budget in budgets}
    each = []
    for draw in range(draws):
        part = calibration.part(draw * size, (draw + 1) * size)
        mine = {budget: part.small[budget] for budget in budgets}
        each.append(_outcome(calibrated(mine, part.whole, risk=risk, confidence=confidence), small, test))
    broken = sum(one["differing"] > risk * judged for one in each)
    worst = max(one["differing"] for one in each)
    exact = test.whole.argmax(1)
    return {
        "kind": "cascade",
        "budgets": list(budgets),
        "risk": risk,
        "confidence": confidence,
        "draws": draws,
        "calibration_questions": size,
        "judged_questions": judged,
        "prompt_tokens": test.tokens,
        "answered": [sum(one["answered"][stage] for one in each) / draws for stage in range(len(budgets) + 1)],
        **{
            name: sum(one[name] for one in each) / draws for name in ("live_tokens", "right", "tokens_read", "attended")
        },
        "differing": sum(one["differing"] for one in each) / draws / judged,
        "worst_differing": worst / judged,
        "worst_differing_limits": limits(worst, judged),
        "broken": broken,
        "broken_surely": sum(lower_limit(one["differing"], judged, CERTAINTY) > risk for one in each),
        "kept": lower_limit(broken, draws, CERTAINTY) <= 1 - confidence,
        "alone": [
            {"budget": budget, "right": _right(said.argmax(1), test), "differing": _share(said.argmax(1) != exact)}
            for budget, said in small.items()
        ],
        "right_whole": _right(exact, test),
    }


def limits(errors: int, trials: int) -> list[float]:
    """Clopper and Pearson's interval of the rate, two-sided."""
    side = 1 - (1 - CERTAINTY) / 2
    return [lower_limit(errors, trials, side), upper_limit(errors, trials, side)]


def _outcome(stages: list[Stage], small: dict[int, Tensor], test: Asked) -> Record:
    """What these thresholds do on the test questions."""
    given = answered(stages, small, test.whole)
    per_stage = [given.budget == budget for budget in (*small, 0)]
    # A question that a later stage answers has been asked by every stage before it that answers at all.
    asked_by = [stage.budget for stage in stages if stage.threshold < float("inf")]
    passes = [[budget for budget in asked_by if budget <= one] for one in small] + [[*asked_by, test.tokens]]
    answered_at = [_share(here) for here in per_stage]
    whole = pairs(test.tokens, test.tokens)
    return {
        "answered": answered_at,
        "differing": int((given.answer != test.whole.argmax(1)).sum()),
        "right": _right(given.answer, test),
        "live_tokens": sum(share * size for share, size in zip(answered_at, (*small, test.tokens), strict=True)),
        "tokens_read": sum(share * len(made) for share, made in zip(answered_at, passes, strict=True)),
        "attended": sum(
            share * sum(pairs(test.tokens, size) for size in made) / whole
            for share, made in zip(answered_at, passes, strict=True)
        ),
    }


def pairs(tokens: int, live: int) -> int:
    """Pairs of a query and a key that it sees, itself included, with so many live tokens at most."""
    most = min(tokens, live)
    return most * (most + 1) // 2 + (tokens - most) * most


def _right(answer: Tensor, test: Asked) -> float:
    return _share(answer == test.truth)


def _share(which: Tensor) -> float:
    return which.double().mean().item()
