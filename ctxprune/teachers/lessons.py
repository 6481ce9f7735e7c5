"""What does a teacher read? Rows of the task's training split, where the model is."""

from __future__ import annotations

from ctxprune.tasks.task import Task, TaskBatch


def lesson(model, task: Task, seed: int, step: int, rows: int) -> TaskBatch:
    """Batch `step` of `rows` training rows, on the model's device."""
    return task.batch("train", seed, step, rows).to(next(model.parameters()).device)
