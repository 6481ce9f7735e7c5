"""When is each key dropped? One pass over the full n x n gate logits in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def drop_times(interaction_query: Tensor, interaction_key: Tensor, beta: Tensor, guard: Tensor, end: Tensor) -> Tensor:
    """tau[b, j] = first query k >= guard[b, j] with x[k, j] <= 0, at most end[b, j]; arguments as
    kernels.drop_times."""
    n = interaction_query.shape[1]
    iq, ik = interaction_query.double(), interaction_key.double()
    x = iq @ ik.transpose(1, 2) / math.sqrt(iq.shape[-1]) + beta.double()
    tau = end.clone()
    for row in range(n):
        dropped = (x[:, row] <= 0) & (row >= guard) & (tau > row)
        tau = torch.where(dropped, torch.full_like(tau, row), tau)
    return tau
