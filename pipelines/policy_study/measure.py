"""How well are a task's questions answered from what a policy keeps, and how much is that?

One pass over whole rows under the policy's drop times: what a cache keeps step by step is the same (a test over all
policies says so), and its bytes follow.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ctxprune.drop_time import DropTimes, forward_with_drop_times
from ctxprune.retrofitting import wrappers
from ctxprune.tasks import Task
from ctxprune.tasks.scoring import in_context, keep_set, score
from ctxprune.tasks.task import Split, TaskBatch
from ctxprune.text.batches import IGNORED
from pipelines.policy_study.truncation import cut

BATCH = 64
"""Rows at a time."""
Prepared = Callable[[object, TaskBatch], AbstractContextManager]
"""What a policy needs around the pass of one batch: scores that are handed over, say."""
Shown = Callable[[TaskBatch], Tensor]
"""The columns of a batch that the model is given at all."""


@dataclass
class Outcome:
    """Of each row [rows]: right answers (share), kept keys of the context (share, mean over layers and heads) and how
    many of its predictions are the dense model's; precision and recall of the kept keys (by any layer) against those
    that are needed; difficulty. Empty where the task does not know."""

    right: Tensor
    kept: Tensor
    agreement: Tensor
    precision: Tensor
    recall: Tensor
    difficulty: Tensor


@torch.no_grad()
def measure(
    model, task: Task, rows: int, *, split: Split = "test", seed: int = 0, prepared: Prepared | None = None,
    dense: list[Tensor] | None = None, shown: Shown | None = None,
) -> Outcome:  # fmt: skip
    """dense: what the dense model predicts, by batch (`predictions`), for the agreement. shown: None: all of each row;
    what is not shown counts as dropped."""
    parts: dict[str, list[Tensor]] = {name: [] for name in Outcome.__dataclass_fields__}
    gated = any(wrapper.rule.gate is not None for wrapper in wrappers(model))
    for index in range(-(-rows // BATCH)):
        batch = task.batch(split, seed, index, min(BATCH, rows - index * BATCH))
        there = shown(batch) if shown else torch.arange(batch.input_ids.shape[1])
        given = cut(batch, there)
        with prepared(model, batch) if prepared else nullcontext():
            taken, logits = passed(model, given)
        left = alive(taken, given, questions_drop=gated)
        kept = left.new_zeros(*left.shape[:-1], batch.input_ids.shape[1])
        kept[..., there] = left
        inside = in_context(batch)
        parts["right"].append(score(logits, given))
        parts["kept"].append(kept.double().mean((0, 2)).sum(-1) / inside.sum(-1))
        if dense is not None:
            asked = given.answers != IGNORED
            same = (logits.argmax(-1) == dense[index][:, there]) & asked
            parts["agreement"].append(same.sum(1) / asked.sum(1))
        if batch.needed is not None:
            precision, recall = keep_set(kept.any(0).any(1), batch)
            parts["precision"].append(precision)
            parts["recall"].append(recall)
        if batch.difficulty is not None:
            parts["difficulty"].append(batch.difficulty)
    return Outcome(**{name: torch.cat(found) if found else torch.empty(0) for name, found in parts.items()})


@torch.no_grad()
def predictions(model, task: Task, rows: int, *, split: Split = "test", seed: int = 0) -> list[Tensor]:
    """The likeliest token at every position, by batch, of a model that keeps everything."""
    found = []
    for index in range(-(-rows // BATCH)):
        batch = task.batch(split, seed, index, min(BATCH, rows - index * BATCH))
        found.append(passed(model, batch)[1].argmax(-1))
    return found


def passed(model, batch: TaskBatch) -> tuple[DropTimes, Float[Tensor, "batch n vocab"]]:
    """Drop times and logits of one pass, compressed where the context ends."""
    return forward_with_drop_times(
        model, batch.input_ids, attention_mask=batch.attention_mask, prompt=batch.context_end
    )


def alive(
    taken: DropTimes, batch: TaskBatch, *, questions_drop: bool = False
) -> Bool[Tensor, "layers batch kv_heads n"]:
    """Keys of the context that are held when the questions begin, by KV head where these decide apart (else one): those
    that the first query behind it sees. questions_drop: and those that this query drops itself, as gates do, which it
    had to find there."""
    times = taken.drop_time if taken.drop_time.ndim == 4 else taken.drop_time[:, :, None]
    seen = times + 1 if questions_drop else times
    return (seen > batch.context_end[:, None, None]) & in_context(batch)[:, None]
