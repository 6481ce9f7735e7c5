"""What is the alpha-sigmoid, with no tricks? Bisection of its defining equation in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST_LOG = -1e4
"""Lower end of the bisection: ln p of the smaller side. exp(-1e4) is far below float64."""


def alpha_sigmoid(x: Tensor, alpha: float) -> Tensor:
    """Binary alpha-entmax: p with p^(a-1) - (1-p)^(a-1) = (a-1) x (arXiv 2305.15805, eq. 6; 1905.05702).

    x: any shape, float. Returns the same shape in float64; exactly 0 for x <= -1/(a-1), exactly 1 for x >= 1/(a-1).
    """
    x = x.double()
    if alpha == 1.0:
        return torch.sigmoid(x)
    log_small = _log_smaller_side(x.abs(), alpha - 1.0)
    small = torch.exp(log_small)
    return torch.where(x < 0, small, 1.0 - small)


def log_alpha_sigmoid(x: Tensor, alpha: float) -> Tensor:
    """ln of the alpha-sigmoid in float64; -inf where the gate is exactly 0. x: any shape."""
    x = x.double()
    if alpha == 1.0:
        return torch.nn.functional.logsigmoid(x)
    log_small = _log_smaller_side(x.abs(), alpha - 1.0)
    return torch.where(x < 0, log_small, torch.log1p(-torch.exp(log_small)))


def _log_smaller_side(magnitude: Tensor, e: float) -> Tensor:
    """s = ln p of the side below 1/2: solves p^e + 1 - (1-p)^e = 1 - e |x| by bisection in s."""
    low = torch.full_like(magnitude, SMALLEST_LOG)
    high = torch.full_like(magnitude, math.log(0.5))
    for _ in range(200):
        middle = 0.5 * (low + high)
        # Both terms minus one, so that nothing cancels when e is small.
        left = torch.expm1(e * middle) - torch.expm1(e * torch.log1p(-torch.exp(middle)))
        too_high = left > -e * magnitude
        high = torch.where(too_high, middle, high)
        low = torch.where(too_high, low, middle)
    return torch.where(e * magnitude >= 1.0, torch.full_like(magnitude, -torch.inf), 0.5 * (low + high))
