"""Which problems are put to every implementation of pruned attention, and what counts as the same answer?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctxprune import kernels

RANK, WIDTH = 4, 8
NAMES = ("query", "key", "value", "interaction_query", "interaction_key", "beta")


def inputs(heads=4, kv_heads=2, n=33, batch=2, dtype=torch.float64, beta=1.5, seed=0) -> list[Tensor]:
    """The six differentiable arguments; gates that drop some keys, keep some and leave some between."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    gates = [normal(batch, n, RANK), normal(batch, n, RANK), torch.tensor(beta, dtype=dtype)]
    return [
        normal(batch, heads, n, WIDTH),
        normal(batch, kv_heads, n, WIDTH),
        normal(batch, kv_heads, n, WIDTH),
        *gates,
    ]


def documents(n: int, batch: int = 2, sinks: int = 2, recent: int = 3) -> dict[str, Tensor]:
    """Rows of two documents cut at different places; first tokens and recent tokens protected."""
    column = torch.arange(n)
    cuts = [max(1, n // 3), max(1, n - 5)][:batch]
    end = torch.stack([torch.where(column < cut, cut, n) for cut in cuts])
    guard = torch.where(column < sinks, n, column + 1 + recent).expand(batch, n)
    return {"end": end, "guard": guard}


def run(tensors, alpha, impl="auto", **plan) -> dict[str, Tensor]:
    """Output, alive sum, and the gradients of a loss that weighs every number of both differently."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output, alive = kernels.pruned_attention(*leaves, alpha, impl=impl, **plan)
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.device, output.dtype)
    loss = (output * weight).sum() + (alive * torch.linspace(0.3, 0.7, len(alive)).to(alive.device, alive.dtype)).sum()
    gradients = torch.autograd.grad(loss, leaves)
    return {"output": output.detach(), "alive": alive.detach(), **dict(zip(NAMES, gradients, strict=True))}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name in one:
        scale = max(1.0, other[name].abs().max().item())
        difference = (one[name].double() - other[name].double()).abs().max().item()
        assert difference <= tolerance * scale, (name, difference, scale)  # False for NaN


def eager(query, key, value, iq, ik, beta, alpha, guard, end) -> tuple[Tensor, Tensor]:
    """The plain n x n formulation in the precision of its inputs."""
    log_alive = kernels.log_survival(iq, ik, beta, alpha, guard=guard, end=end)
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, 1).transpose(2, 3) / math.sqrt(WIDTH) + log_alive[:, None]
    causal = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    weights = torch.softmax(logits.masked_fill(~causal, -torch.inf), -1).to(value.dtype)
    return weights @ value.repeat_interleave(groups, 1), log_alive.exp().tril(-1).sum((1, 2))
