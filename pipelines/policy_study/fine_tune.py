"""How does a small model learn to answer from a pruned context? Fine-tuned under its own policy, gates and all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

import torch
from torch.nn.functional import cross_entropy

from ctxprune import objective
from ctxprune.budget import SparsityController
from ctxprune.drop_time import DropTimes
from ctxprune.retrofitting import gate_parameters, state_of
from ctxprune.schedule import MEASURE_EVERY, SHARP_ALPHA
from ctxprune.tasks import Task
from ctxprune.tasks.scoring import in_context
from ctxprune.text.batches import IGNORED
from pipelines.policy_study.measure import alive

# What stays is found while gates are soft: sharp ones no longer learn from what they keep or drop for certain.
_SOFT_UNTIL, _SHARP_FROM = 0.4, 0.8  # shares of the steps between which alpha rises from 1 to 8
_WARM_UP = 30  # steps
# Share of the steps over which the learning rates fall, and eps of AdamW. With 1e-8 rows that gates have not yet lost
# move a model by whole steps of noise, until one step is too far; without gates that was not seen, and the shorter
# fall answers more.
_WITH_GATES, _WITHOUT = (0.6, 1e-5), (0.3, 1e-8)
_BETAS = (0.9, 0.98)  # with 0.999 one hard row among solved ones moves a weight threefold, and the model is lost
# A threshold that gives keys back loses no answers, one that takes more does: gates aim at less than their budget.
_AIM = 0.9  # part of the budget
_RAMP, _GAMMA, _MOST, _BAND = 0.2, 0.01, 30.0, 0.1  # of the sparsity controller: left alone near the aim
_RECENT = 8  # steps whose answers say how many are lost
_LOST = 0.2  # part of its answers that a model may have lost before nothing presses it to drop more


@dataclass(frozen=True)
class FineTuning:
    """How long and how fast."""

    steps: int = 800
    """Steps of AdamW."""
    batch: int = 32
    """Rows per step."""
    learning_rate: float = 2e-4
    """Of the model's own weights."""
    gate_learning_rate: float = 3e-3
    """Of the gates."""
    sparsity: float | None = None
    """Share of the context's keys that gates are to have dropped when the questions begin."""
    seed: int = 0
    """Of the rows that are read."""


def fine_tune(model, task: Task, how: FineTuning, progress: Callable[[int, float], None] | None = None) -> None:
    """Train a retrofitted model on the task's answers under its policy. progress(step, loss)."""
    gates, state = {id(p) for p in gate_parameters(model)}, state_of(model)
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in gates], "peak": how.learning_rate, "gates": False},
        {"params": gate_parameters(model), "peak": how.gate_learning_rate, "gates": True},
    ]
    groups = [group for group in groups if group["params"]]
    decay, eps = _WITH_GATES if gates else _WITHOUT
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, eps=eps, weight_decay=0.0)
    controller = None
    if gates and how.sparsity:
        aim = 1.0 - _AIM * (1.0 - how.sparsity)
        controller = SparsityController(aim, ramp=_RAMP, gamma=_GAMMA, most=_MOST, band=_BAND)
    gamma, right = controller.gamma if controller else 0.0, []
    model.train()
    for step in range(how.steps):
        done = step / how.steps
        state.alpha = objective.alpha_at((done - _SOFT_UNTIL) / (_SHARP_FROM - _SOFT_UNTIL), 1.0, 8.0)
        for group in optimizer.param_groups:
            rate = group["peak"] * min(1.0, (step + 1) / _WARM_UP, (1.0 - done) / decay)
            # The same step of a score changes the more of a gate, the sharper that is.
            group["lr"] = rate / state.alpha if group["gates"] else rate
        rows = task.batch("train", how.seed, step, how.batch)
        measuring = controller is not None and step % MEASURE_EVERY == 0
        state.record, state.prompt = {} if measuring else None, rows.context_end
        logits = model(rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
        asked = rows.answers != IGNORED
        loss = cross_entropy(logits[asked], rows.answers[asked])
        right.append((logits[asked].argmax(-1) == rows.answers[asked]).float().mean().item())
        kept = objective.kept_share(model) if gates else torch.zeros(())
        optimizer.zero_grad()
        (loss + pressing(right) * gamma * kept).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if controller is not None and measuring:
            gone = 1.0 - kept.item()
            if state.alpha >= SHARP_ALPHA:
                left = alive(DropTimes(state.recorded(), state.documents.end), rows, questions_drop=True)
                gone = 1.0 - (left.sum() / (left.shape[0] * in_context(rows).sum())).item()
            gamma = controller.update(gone, done)
        if progress is not None:
            progress(step + 1, loss.item())
    state.record = state.prompt = None
    model.eval()


def pressing(right: list[float]) -> float:
    """Part of the sparsity weight to press with, in [0, 1]: the less, the more answers are lost.

    right: share of the answers that were right, step by step. What sharp gates have dropped they do not learn to keep
    again, so a model is pressed no further until it answers from what it has.
    """
    first = mean(right[:_WARM_UP])  # gates begin open
    if len(right) <= _WARM_UP or first == 0.0:
        return 1.0
    lost = 1.0 - mean(right[-_RECENT:]) / first
    return min(1.0, max(0.0, 1.0 - lost / _LOST))
