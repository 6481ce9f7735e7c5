"""What if the model is simply given less? All but the first token and the last share of the context is cut from the
rows before they are read: what stays never saw the rest, and reading gets shorter too."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune.policies.budget import Budget
from ctxprune.tasks.task import TaskBatch


def columns(batch: TaskBatch, share: float, first: int) -> Int[Tensor, " shown"]:
    """The columns of the rows that the model is given: `first` ones, the last ones of the context so that this share of
    it is there (rounded up), and all behind it. UserError where contexts do not end together."""
    end = batch.end
    last = int(Budget(share=share).count(batch.context_end[:1], 0, 1)) - first
    there = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    return there[(there < first) | (there >= end - last)]


def cut(batch: TaskBatch, shown: Int[Tensor, " shown"]) -> TaskBatch:
    """The same rows with these columns only, for a model to read from position 0 on."""
    whole = batch.input_ids.shape
    parts = {field.name: getattr(batch, field.name) for field in fields(batch)}
    kept = {name: part[:, shown] for name, part in parts.items() if part is not None and part.shape == whole}
    return replace(batch, **kept, context_end=(shown < batch.context_end[:, None]).sum(1))
