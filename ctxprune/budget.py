"""How is a sparsity target met?

A controller steers the sparsity weight while training; thresholds settle the last point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ctxprune.drop_time import DropTimes, drop_times
from ctxprune.errors import UserError
from ctxprune.policies.budget import Budget
from ctxprune.policies.rule import Rule
from ctxprune.policies.strided import StridedConfig, StridedRule
from ctxprune.policies.window import WindowConfig, WindowRule
from ctxprune.retrofitting import wrappers
from ctxprune.visibility import Layout, ends, lifetimes, visible_pairs

TOLERANCE = 2e-4
"""Calibration stops this close to the target on its own text."""


@dataclass
class SparsityController:
    """Multiplicative integral control of the sparsity weight gamma, with a proportional kick.

    The measured sparsity is asked to follow a goal that moves from where it started to the target and stays there while
    the gates sharpen: under the soft gates near alpha = 1 a high sparsity costs little. A fixed gamma cannot promise a
    target: where it ends depends on the start of beta, the speed of alpha and the length of training as much as on it.
    """

    target: float
    """Share of the context dropped at the end, in (0, 1)."""
    ramp: float = 0.15
    """Share of the training over which the goal moves."""
    gamma: float = 0.1
    """Sparsity weight now."""
    integral: float = 150.0
    """Relative change of gamma per unit of error that lasts a whole training, however many steps that has."""
    proportional: float = 6.0
    """Instant relative change per unit of error."""
    most: float = 100.0
    """Highest gamma: where the goal cannot be reached it would rise for ever."""
    band: float = 0.0
    """Part of what may stay, 1 - target, by which the measured sparsity may miss the target once the goal stands still
    there before gamma is touched again. Sharp gates hardly follow: over the last hundredths gamma would rise until it
    takes the task along, or fall to nothing. A threshold sets those afterwards."""
    smoothed: float | None = None
    """Running mean of the measured sparsity."""
    start: float | None = None
    """Sparsity at the first measurement."""
    last: float = 0.0
    """Progress at the last measurement."""

    def goal(self, progress: float) -> float:
        """Sparsity asked for after a share `progress` of the training: from where it started to the target."""
        rise = min(1.0, progress / self.ramp)
        start = 0.0 if self.start is None else self.start
        return start + (self.target - start) * math.sin(0.5 * math.pi * rise)

    def update(self, measured: float, progress: float) -> float:
        """Take a measurement after a share `progress` of the training; returns the gamma to use from now on."""
        if self.start is None:
            self.start = measured
        if progress >= self.ramp and abs(measured - self.target) < self.band * (1.0 - self.target):
            measured = self.smoothed = self.target
        self.smoothed = measured if self.smoothed is None else 0.5 * self.smoothed + 0.5 * measured
        error = self.goal(progress) - self.smoothed
        passed, self.last = progress - self.last, progress
        self.gamma = min(self.most, max(1e-3, self.gamma * math.exp(self.integral * passed * error)))
        return min(self.most, self.gamma * math.exp(self.proportional * error))


@torch.no_grad()
def calibrate(model, batches: list, target: float) -> float:
    """Shift every layer's beta by one common amount so that the batches' step-function sparsity is `target`.

    batches: objects with input_ids and position_ids, training text. Returns the shift. Sparsity falls as beta rises, so
    bisection finds it; raises UserError if no shift reaches the target.
    """
    gates = [wrapper.rule.gate for wrapper in wrappers(model) if wrapper.rule.gate is not None]
    before = [gate.beta.detach().clone() for gate in gates]

    def sparsity(shift: float) -> float:
        for gate, beta in zip(gates, before, strict=True):
            gate.beta.copy_(beta + shift)
        return measure(model, batches)

    try:
        low, high = _bracket(sparsity, target)
        middle = 0.5 * (low + high)
        for _ in range(40):
            realised = sparsity(middle)
            if abs(realised - target) < TOLERANCE:
                break
            low, high = (middle, high) if realised > target else (low, middle)
            middle = 0.5 * (low + high)
    except BaseException:  # an interruption too leaves the thresholds as they were
        for gate, beta in zip(gates, before, strict=True):
            gate.beta.copy_(beta)
        raise
    return middle


def _bracket(sparsity, target: float) -> tuple[float, float]:
    """Two shifts, the lower dropping more than the target, the higher less."""
    reach = 0.05
    while reach < 1e3:
        if sparsity(reach) < target < sparsity(-reach):
            return -reach, reach
        reach *= 2.0
    raise UserError(f"no threshold drops {target:.0%} of the context: protect fewer tokens or choose another target")


@torch.no_grad()
def measure(model, batches: list) -> float:
    """Step-function sparsity over batches: mean over layers of dropped pairs / visible pairs."""
    kept, pairs, device = 0.0, 0.0, next(model.parameters()).device
    for batch in batches:
        taken = drop_times(model, batch.input_ids.to(device), position_ids=batch.position_ids.to(device))
        kept += taken.kept_pairs().sum().item() / taken.drop_time.shape[0]
        pairs += visible_pairs(taken.document_end).sum().item()
    return 1.0 - kept / max(1, pairs)


def refuse_out_of_reach(target: float, documents: Layout, sinks: int, recent: int) -> None:
    """UserError where the protected tokens alone exceed the budget on these documents, whatever gates drop."""
    pairs = visible_pairs(documents.end).sum().item()
    least = _kept_pairs(WindowRule(1), documents, sinks, recent)
    if least > (1.0 - target) * pairs:
        raise UserError(
            f"no gates drop {target:.0%} of the context: sinks={sinks} and recent={recent} protect "
            f"{least / pairs:.0%} of it; lower them or choose a lower sparsity"
        )


def window_for(target: float, documents: Layout, layers: int, sinks: int, recent: int) -> WindowConfig:
    """The window whose realised sparsity on these documents is `target`: one width or two neighbouring ones over the
    layers.

    documents: of a sample of training text. Raises UserError when the protected tokens alone exceed the budget.
    """

    def kept(width: int) -> float:
        return _kept_pairs(WindowRule(width), documents, sinks, recent)

    wanted = (1.0 - target) * visible_pairs(documents.end).sum().item()
    low, high = 1, documents.position.shape[1]
    if kept(low) > wanted:
        raise UserError(f"no window drops {target:.0%} of the context: protect fewer tokens or choose a lower sparsity")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(middle) <= wanted else (low, middle)
    return WindowConfig(tuple(_mixture(kept, low, high, wanted, layers)), sinks, recent)


def strided_for(target: float, documents: Layout, layers: int, sinks: int, recent: int) -> StridedConfig:
    """The strided pattern whose realised sparsity on these documents is `target`.

    The published pattern (the last token of every block lasts) cannot drop more than about 1 - 2/sqrt(n); beyond, fewer
    blocks leave a lasting token. Of two block lengths with one budget the longer, more local one is taken: it costs
    less perplexity.
    """
    wanted = (1.0 - target) * visible_pairs(documents.end).sum().item()
    n = documents.position.shape[1]
    for every in range(1, n + 1):

        def kept(block: int, every: int = every) -> float:
            return _kept_pairs(StridedRule(block, every), documents, sinks, recent)

        counts = {block: kept(block) for block in range(1, n + 1)}
        below = max((block for block in counts if counts[block] <= wanted), default=None)
        if below is not None:
            blocks = _mixture(counts.__getitem__, below, min(n, below + 1), wanted, layers)
            return StridedConfig(tuple(blocks), (every,) * layers, sinks, recent)
    raise UserError(f"no strided pattern drops {target:.0%} of {n} tokens: choose a lower sparsity")


def share_for(target: float, documents: Layout, sinks: int, recent: int) -> Budget:
    """The share of the tokens so far that a policy which ranks keys at every step may hold, so that its sparsity on
    these documents is `target`: how many keys stay is known before any score is.

    Raises UserError when the protected tokens alone exceed the budget.
    """
    length = documents.position.flatten() + 1
    past = (length - 1).sum().item()
    wanted = (1.0 - target) * past

    def kept(share: float) -> float:
        most = Budget(share=share).count(length, 0, 1).clamp(min=sinks + recent + 1)
        return (torch.minimum(most, length) - 1).sum().item()

    low, high = 1e-6, 1.0
    if kept(low) > wanted:
        raise UserError(f"no budget drops {target:.0%} of the context: protect fewer tokens or choose a lower sparsity")
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if kept(middle) <= wanted else (low, middle)
    return Budget(share=low)


def _mixture(kept, low: int, high: int, wanted: float, layers: int) -> list[int]:
    """`high` in as many layers as bring the mean of `kept` closest to `wanted`, `low` in the others."""
    low_kept, high_kept = kept(low), kept(high)
    share = 0.0 if high_kept == low_kept else (wanted - low_kept) / (high_kept - low_kept)
    count = min(layers, max(0, round(share * layers)))
    return [high] * count + [low] * (layers - count)


def _kept_pairs(rule: Rule, documents: Layout, sinks: int, recent: int) -> float:
    """Pairs (query, earlier key) that one layer keeps under a rule without a gate."""
    drop_time = ends(documents, lifetimes(documents.position, rule, sinks, recent, None))
    return float(DropTimes(drop_time[None], documents.end).kept_pairs().sum())
