"""What do a block's gates come to? ln g and d ln g/dx, solved only where they can still change something."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctxprune.kernels.sigmoid.torch_path import LOG_ZERO, log_alpha_sigmoid

DEAD = -90.0
"""exp(-90) is below the smallest normal float32 (1.2e-38): a key this far gone no longer counts, nor do its gates."""


def block_gates(
    interaction_query: Tensor,
    interaction_key: Tensor,
    beta: Tensor,
    alpha: float,
    guard: Tensor,
    end: Tensor,
    carry: Tensor,
    start: int,
) -> tuple[Tensor, Tensor]:
    """(ln g, d ln g/dx) of a block of queries, the first of them at position `start`; each (batch, rows, keys).

    interaction_query (batch, rows, rank), interaction_key (batch, keys, rank), the rest (batch, keys); carry is log I
    before the block. Solved are only the gates under the diagonal, not guarded, of keys that are not gone yet.
    """
    row = torch.arange(start, start + interaction_query.shape[1], device=guard.device)[None, :, None]
    ended = row >= end[:, None]
    scale = 1.0 / math.sqrt(interaction_query.shape[-1])
    x = torch.baddbmm(beta, interaction_query, interaction_key.transpose(1, 2), alpha=scale)
    active = (row >= guard[:, None]) & ~ended & (carry[:, None] > DEAD)
    if x.device.type == "cpu":
        # Solving the few active gates is cheaper than all of them; on a GPU the count would cost a synchronisation.
        log_gate, slope = torch.zeros_like(x), torch.zeros_like(x)
        if alpha > 1.0:
            edge = 1.0 / (alpha - 1.0)
            log_gate.masked_fill_(active & (x <= -edge), LOG_ZERO)
            active &= (x < edge) & (x > -edge)
        solve = active.view(-1).nonzero().view(-1)
        solved_gate, solved_slope = log_alpha_sigmoid(x.view(-1).index_select(0, solve), alpha)
        log_gate.view(-1).index_copy_(0, solve, solved_gate)
        slope.view(-1).index_copy_(0, solve, solved_slope)
    else:
        log_gate, slope = (t.masked_fill(~active, 0.0) for t in log_alpha_sigmoid(x, alpha))
    return log_gate.masked_fill_(ended, LOG_ZERO), slope


class _LogGate(torch.autograd.Function):
    """ln sigma_alpha with its derivative."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: float) -> Tensor:
        log_gate, slope = log_alpha_sigmoid(x, alpha)
        ctx.save_for_backward(slope)
        return log_gate

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None


def log_survival(
    interaction_query: Tensor, interaction_key: Tensor, beta: Tensor, alpha: float, guard: Tensor, end: Tensor
) -> Tensor:
    """log I as a tensor, (batch, n, n), 0 on and above the diagonal; arguments as kernels.log_survival."""
    work = torch.float64 if interaction_query.dtype == torch.float64 else torch.float32
    iq, ik, offset = (t.to(work) for t in (interaction_query, interaction_key, beta))
    x = iq @ ik.transpose(1, 2) / math.sqrt(iq.shape[-1]) + offset
    row = torch.arange(iq.shape[1], device=iq.device)[None, :, None]
    log_gate = torch.where(row >= guard[:, None, :], _LogGate.apply(x, alpha), 0.0)
    log_gate = torch.where((row >= end[:, None, :]) & (row > row.transpose(1, 2)), LOG_ZERO, log_gate)
    return log_gate.cumsum(1).clamp(min=LOG_ZERO)
