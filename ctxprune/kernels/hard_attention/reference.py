"""What is attention under drop times, with no tricks? A masked softmax in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ctxprune.kernels.hard_attention.patterns import Pattern


def drop_time_attention(
    query: Tensor, key: Tensor, value: Tensor, drop_time: Tensor, scale: float, pattern: Pattern | None = None
) -> Tensor:
    """Key j is visible to query k iff j <= k < drop_time[j]; arguments as kernels.drop_time_attention."""
    n, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(groups, dim=1) for t in (key, value))
    if drop_time.ndim == 3:
        drop_time = drop_time.repeat_interleave(groups, dim=1)
    else:
        drop_time = drop_time[:, None]
    row = torch.arange(n, device=query.device)[:, None]
    column = torch.arange(n, device=query.device)
    visible = (column <= row) & (row < drop_time[:, :, None, :])
    if pattern is not None:
        visible = visible & pattern.allowed.repeat_interleave(pattern.block, 0)[:n]
    logits = (query.double() @ key.transpose(2, 3) * scale).masked_fill(~visible, -torch.inf)
    return torch.softmax(logits, -1) @ value
