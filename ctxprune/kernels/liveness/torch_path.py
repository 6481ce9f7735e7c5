"""When is each key dropped, in O(n) memory? Gate logits streamed by blocks of queries; one minimum per key is kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 256
"""Queries per block: the transient gate logits are (batch, BLOCK, n)."""


def drop_times(interaction_query: Tensor, interaction_key: Tensor, beta: Tensor, guard: Tensor, end: Tensor) -> Tensor:
    """Arguments and result as kernels.drop_times."""
    work = torch.float64 if interaction_query.dtype == torch.float64 else torch.float32
    iq, ik, offset = (t.to(work) for t in (interaction_query, interaction_key, beta))
    n, scale = iq.shape[1], 1.0 / math.sqrt(iq.shape[-1])
    tau = end.clone()
    for start in range(0, n, BLOCK):
        stop = min(n, start + BLOCK)
        row = torch.arange(start, stop, device=iq.device, dtype=tau.dtype)[None, :, None]
        x = torch.baddbmm(offset, iq[:, start:stop], ik[:, :stop].transpose(1, 2), alpha=scale)
        dropping = (x <= 0) & (row >= guard[:, None, :stop])
        first = torch.where(dropping, row, tau[:, None, :stop]).amin(1)
        tau[:, :stop] = torch.minimum(tau[:, :stop], first)
    return tau
