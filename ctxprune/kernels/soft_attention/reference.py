"""What is soft pruned attention, with no tricks? The paper's product form, n x n, in float64 with autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctxprune.kernels.sigmoid import reference as alpha_sigmoid_reference


class _Gate(torch.autograd.Function):
    """sigma_alpha by bisection; derivative 1 / (p^(a-2) + (1-p)^(a-2)) inside the band, 0 outside."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: float) -> Tensor:
        p = alpha_sigmoid_reference.alpha_sigmoid(x, alpha)
        inside = (p > 0) & (p < 1)
        safe = torch.where(inside, p, 0.5)
        derivative = 1.0 / (safe ** (alpha - 2.0) + (1.0 - safe) ** (alpha - 2.0))
        ctx.save_for_backward(torch.where(inside, derivative, 0.0))
        return p

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (derivative,) = ctx.saved_tensors
        return gradient * derivative, None


def survival(
    interaction_query: Tensor,
    interaction_key: Tensor,
    beta: Tensor,
    alpha: float,
    guard: Tensor,
    end: Tensor,
) -> Tensor:
    """I[b, k, j], the share of key j that query k still sees: prod_{m=j+1..k} g[m, j] (arXiv 2305.15805, eq. 5).

    interaction_query, interaction_key: (batch, n, rank); guard, end: (batch, n) as in kernels.pruned_attention.
    Returns (batch, n, n) in float64: 1 on the diagonal, 0 above it.
    """
    n = interaction_query.shape[1]
    iq, ik = interaction_query.double(), interaction_key.double()
    x = iq @ ik.transpose(1, 2) / math.sqrt(iq.shape[-1]) + beta.double()
    row = torch.arange(n, device=x.device)[None, :, None]
    column = torch.arange(n, device=x.device)[None, None, :]
    gate = torch.where(row >= guard[:, None, :], _Gate.apply(x, alpha), 1.0)
    gate = torch.where(row >= end[:, None, :], 0.0, gate)
    return torch.cumprod(torch.where(row > column, gate, 1.0), dim=1) * (row >= column)


def pruned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    interaction_query: Tensor,
    interaction_key: Tensor,
    beta: Tensor,
    alpha: float,
    guard: Tensor,
    end: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T scale + log I) V and the sum of I under the diagonal; arguments as kernels.pruned_attention."""
    alive = survival(interaction_query, interaction_key, beta, alpha, guard, end)
    groups = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(groups, dim=1) for t in (key, value))
    logits = query.double() @ key.transpose(2, 3) * scale
    # Weighting exp(logits) by I is the same as adding log I, and stays finite in value and gradient where I = 0.
    top = logits.masked_fill(alive[:, None] == 0, -torch.inf).amax(-1, keepdim=True).detach()
    # Above the diagonal and where a key is gone the logit may tower over the row's own maximum: clamp, I is 0 there.
    weight = torch.exp((logits - top).clamp(max=50.0)) * alive[:, None]
    output = weight / weight.sum(-1, keepdim=True) @ value
    return output, alive.tril(-1).sum((1, 2))
