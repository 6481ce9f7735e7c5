"""What is pruned attention as published? n x n tensors throughout (arXiv 2305.15805), and the same made strong."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ctxprune import kernels
from pipelines.kernel_benchmark.problem import Problem


def reference_formulation(given: Problem) -> tuple[Tensor, Tensor]:
    """The published formulation: gates by 25 bisections, n x n float32 tensors."""
    return _product_form(given, _Gate.apply(_logits(*given.gates()), given.alpha, bisected))


def plain_formulation(given: Problem) -> tuple[Tensor, Tensor]:
    """The same in the problem's precision (gates in float32 at least) with gates that are solved exactly: what error is
    to be expected. It shares no code with the implementations that it is held against."""
    work = torch.promote_types(given.query.dtype, torch.float32)
    logits = _logits(*(tensor.to(work) for tensor in given.gates()))
    return _product_form(given, _Gate.apply(logits, given.alpha, exact))


def reference_step(given: Problem) -> Tensor:
    """The published formulation at inference: a gate is 1 where its logit is above 0, else 0."""
    return _product_form(given, (_logits(*given.gates()) > 0).to(given.query.dtype))[0]


def reference_made_strong(given: Problem) -> tuple[Tensor, Tensor]:
    """The same n x n formulation with our exact Newton gates and a running sum of logarithms, through SDPA's mask."""
    log_alive = kernels.log_survival(*given.gates(), given.alpha, guard=given.guard, end=given.end)
    causal = torch.ones(log_alive.shape[-2:], dtype=torch.bool, device=log_alive.device).tril()
    bias = log_alive.masked_fill(~causal, -torch.inf)[:, None].to(given.query.dtype)
    output = scaled_dot_product_attention(given.query, *_for_each_head(given), attn_mask=bias)
    return output, log_alive.exp().tril(-1).sum((1, 2))


def masked(given: Problem, visible: Tensor) -> Tensor:
    """Softmax attention, one operation after the other, of the queries over the keys they see; visible: (batch,
    queries, n), the queries being the last ones."""
    key, value = _for_each_head(given)
    query = given.query[:, :, -visible.shape[1] :]
    logits = query @ key.transpose(2, 3) / math.sqrt(key.shape[-1])
    return torch.softmax(logits.masked_fill(~visible[:, None], -torch.inf), -1) @ value


def visible_pairs(times: Tensor) -> Tensor:
    """(batch, n, n) booleans: whether a query sees a key, from drop times (batch, n)."""
    column = torch.arange(times.shape[-1], device=times.device)
    return (column <= column[:, None]) & (column[:, None] < times[:, None, :])


def _for_each_head(given: Problem) -> tuple[Tensor, Tensor]:
    """Keys and values, repeated for the query heads that share them."""
    groups = given.query.shape[1] // given.key.shape[1]
    return given.key.repeat_interleave(groups, 1), given.value.repeat_interleave(groups, 1)


def _logits(query: Tensor, key: Tensor, beta: Tensor) -> Tensor:
    return query @ key.transpose(1, 2) / math.sqrt(query.shape[-1]) + beta


def _product_form(given: Problem, gate: Tensor) -> tuple[Tensor, Tensor]:
    n, row = gate.shape[-1], torch.arange(gate.shape[-1], device=gate.device)[:, None]
    if given.guard is not None:
        gate = torch.where(row < given.guard[:, None, :], 1.0, gate)
    if given.end is not None:
        gate = torch.where(row < given.end[:, None, :], gate, 0.0)
    below = torch.ones(n, n, dtype=torch.bool, device=gate.device).tril(-1)
    alive = torch.cumprod(torch.where(below, gate, 1.0), 1).tril()
    key, value = _for_each_head(given)
    logits = given.query @ key.transpose(2, 3) / math.sqrt(key.shape[-1])
    logits = logits + torch.log(alive.clamp(min=1e-30))[:, None].to(logits.dtype)
    logits = logits.masked_fill(alive[:, None] == 0, -torch.inf)
    return torch.softmax(logits, -1) @ value, alive.tril(-1).sum((1, 2))


def bisected(x: Tensor, alpha: float) -> Tensor:
    """The alpha-sigmoid as published: bisection of the threshold of (x, 0), 25 halvings in float32."""
    scores = torch.stack([x, torch.zeros_like(x)], -1) * (alpha - 1.0)
    low = scores.amax(-1, keepdim=True) - 1.0
    width = 1.0 - 0.5 ** (alpha - 1.0)
    at_low = ((scores - low).clamp(min=0) ** (1.0 / (alpha - 1.0))).sum(-1, keepdim=True) - 1.0
    for _ in range(25):
        width = width / 2
        share = (scores - (low + width)).clamp(min=0) ** (1.0 / (alpha - 1.0))
        low = torch.where((share.sum(-1, keepdim=True) - 1.0) * at_low >= 0, low + width, low)
    return (share / share.sum(-1, keepdim=True))[..., 0]


def exact(x: Tensor, alpha: float) -> Tensor:
    """The alpha-sigmoid, solved in float64 and rounded."""
    return kernels.alpha_sigmoid(x, alpha, impl="reference").to(x.dtype)


class _Gate(torch.autograd.Function):
    """The alpha-sigmoid by one of the two, with its derivative."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: float, solve: Callable[[Tensor, float], Tensor]) -> Tensor:
        gate = solve(x, alpha)
        ctx.save_for_backward(gate)
        ctx.alpha = alpha
        return gate

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (gate,) = ctx.saved_tensors
        inside = (gate > 0) & (gate < 1)
        safe = torch.where(inside, gate, 0.5)
        slope = 1.0 / (safe ** (ctx.alpha - 2.0) + (1.0 - safe) ** (ctx.alpha - 2.0))
        return torch.where(inside, gradient * slope, 0.0), None, None
