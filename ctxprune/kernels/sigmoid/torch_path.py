"""How is the exact alpha-sigmoid computed fast? A few Newton steps on the logarithm of the smaller side."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_ZERO = -1e30
"""Stands for ln 0: finite, so that sums of it never give NaN, and exp of it is exactly 0."""

STEEP_ALPHA = 5.0
"""Above it float32 needs a third Newton step to stay under 2e-7 (tests/ctxprune/kernels/test_alpha_sigmoid.py)."""


def alpha_sigmoid(x: Tensor, alpha: float) -> Tensor:
    """Keep probability sigma_alpha(x) with its derivative for autograd; x: any shape; half precision is
    solved in float32."""
    return _AlphaSigmoid.apply(x, alpha)


def log_alpha_sigmoid(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """ln sigma_alpha(x) and its derivative d ln sigma / dx, both of x's shape; no autograd.

    The logarithm is LOG_ZERO where the gate is exactly 0; the derivative is exactly 0 wherever the gate is 0 or 1.
    """
    if alpha == 1.0:
        return torch.nn.functional.logsigmoid(x), torch.sigmoid(-x)
    e = alpha - 1.0
    y = e * x.abs()
    inside = y < 1.0
    log_small = _log_smaller_side(torch.where(inside, y, 0.0), e)
    log_large = torch.log1p(-torch.exp(log_small))
    negative = x < 0
    log_gate = torch.where(negative, log_small, log_large)
    # d ln g/dx = 1 / (g (p^(a-2) + (1-p)^(a-2))), written in logarithms so that it has no 0/0 at the edges.
    other = torch.where(negative, log_large, log_small)
    slope = 1.0 / (torch.exp(e * log_gate) + torch.exp(log_gate + (e - 1.0) * other))
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    log_gate = torch.where(inside, log_gate, torch.where(negative, zero + LOG_ZERO, zero))
    return log_gate, torch.where(inside, slope, zero)


def _log_smaller_side(y: Tensor, e: float) -> Tensor:
    """s = ln p, p <= 1/2, solving f(s) = ln(p^e + 1 - (1-p)^e) = ln(1 - y) for y = e |x| in [0, 1)."""
    log_u = torch.log1p(-y)
    s = _start(y, log_u, e)
    steps = 5 if y.dtype == torch.float64 else 2 if e <= STEEP_ALPHA - 1.0 else 3
    for _ in range(steps):
        p = torch.exp(s)
        log_rest = torch.log1p(-p)
        power = torch.exp(e * s)
        # Two forms of f, each where it cancels nothing: f near 0 (gate almost saturated) and f near 1.
        value = power - torch.expm1(e * log_rest)
        minus_one = torch.expm1(e * s) - torch.expm1(e * log_rest) if e < 1.0 else power - torch.exp(e * log_rest)
        log_value = torch.where(value < 0.5, torch.log(value), torch.log1p(minus_one))
        slope = e * (power + torch.exp(s + (e - 1.0) * log_rest))
        s = (s - (log_value - log_u) * value / slope).clamp(max=-math.log(2.0))
    return s


def _start(y: Tensor, log_u: Tensor, e: float) -> Tensor:
    """Where Newton starts: the exact solution of one of the two terms, whichever dominates."""
    if e < 1.0:
        return (log_u / e - torch.log1p(torch.exp(log_u * ((1.0 - e) / e)))).clamp(max=-math.log(2.0))
    u = torch.exp(log_u)
    one_sided = torch.log(torch.maximum(1.0 - torch.pow(y, 1.0 / e), u / e))
    return torch.minimum(log_u / e, one_sided).clamp(max=-math.log(2.0))


class _AlphaSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, alpha: float) -> Tensor:
        # In half precision a small gate's logarithm would keep two digits.
        log_gate, slope = log_alpha_sigmoid(x.to(torch.promote_types(x.dtype, torch.float32)), alpha)
        gate = torch.exp(log_gate)
        ctx.save_for_backward(gate * slope)
        return gate.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (derivative,) = ctx.saved_tensors
        return (gradient * derivative).to(gradient.dtype), None
