"""How does a small model learn to answer from a pruned context? Fine-tuned under its own policy, gates and all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from ctxprune import objective
from ctxprune.batches import IGNORED
from ctxprune.budget import SparsityController
from ctxprune.drop_time import DropTimes
from ctxprune.retrofitting import gate_parameters, state_of
from ctxprune.tasks import Task
from ctxprune.tasks.scoring import in_context
from pipelines.policy_study.measure import alive

_SHARP_FROM = 0.8  # share of the steps after which the gates are as sharp as they get
_SHARP_ALPHA = 4.0  # from here on soft and hard sparsity differ little, and the hard one is watched
_WARM_UP, _DECAY = 30, 0.3  # steps; share of them
_MEASURE_EVERY = 4
_BETAS = (0.9, 0.98)  # with 0.999 one hard row among solved ones moves a weight threefold, and the model is lost
_MOST = 3.0  # sparsity weight; at 1 real texts kept twice their budget, and the threshold took their answers with it


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
        {"params": [p for p in model.parameters() if id(p) not in gates], "peak": how.learning_rate},
        {"params": gate_parameters(model), "peak": how.gate_learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, weight_decay=0.0)
    controller = SparsityController(how.sparsity, most=_MOST) if gates and how.sparsity else None
    gamma = controller.gamma if controller else 0.0
    model.train()
    for step in range(how.steps):
        done = step / how.steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / _WARM_UP, (1.0 - done) / _DECAY)
        state.alpha = objective.alpha_at(done / _SHARP_FROM, 1.0, 8.0)
        rows = task.batch("train", how.seed, step, how.batch)
        measuring = controller is not None and step % _MEASURE_EVERY == 0
        state.record, state.prompt = {} if measuring else None, rows.context_end
        logits = model(rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
        asked = rows.answers != IGNORED
        loss = cross_entropy(logits[asked], rows.answers[asked])
        kept = objective.kept_share(model) if gates else torch.zeros(())
        optimizer.zero_grad()
        (loss + gamma * kept).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if controller is not None and measuring:
            gone = 1.0 - kept.item()
            if state.alpha >= _SHARP_ALPHA:
                left = alive(DropTimes(state.recorded(), state.documents.end), rows, questions_drop=True)
                gone = 1.0 - (left.sum() / (left.shape[0] * in_context(rows).sum())).item()
            gamma = controller.update(gone, done)
        if progress is not None:
            progress(step + 1, loss.item())
    state.record = state.prompt = None
    model.eval()
