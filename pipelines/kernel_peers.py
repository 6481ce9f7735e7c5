"""What is pruned attention measured against? One function per peer: the same inputs, a forward pass to call."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import kernels


@dataclass
class Problem:
    """One attention layer's inputs; all but alpha require gradients.

    query, key, value: (batch, heads or kv_heads, n, width); interaction_query, interaction_key: (batch, n, rank).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    interaction_query: Tensor
    interaction_key: Tensor
    beta: Tensor
    alpha: float

    def tensors(self) -> list[Tensor]:
        return [self.query, self.key, self.value, self.interaction_query, self.interaction_key, self.beta]


Forward = Callable[[Problem], tuple[Tensor, Tensor | None]]
"""Output, and the sum of I where the peer has gates."""


@dataclass(frozen=True)
class Peer:
    """A way to compute attention; gated: with trainable gates, else the dense model's cost."""

    name: str
    forward: Forward
    gated: bool
    quadratic: bool = False
    """It keeps n x n tensors per head."""
    absent: str | None = None
    """Why it cannot run here."""


def peers(device: torch.device) -> list[Peer]:
    """Every peer, those that cannot run here with the reason; ours first."""
    cuda = device.type == "cuda"
    found = [Peer(f"ctxprune {impl}", _ours(impl), True) for impl in _implementations(device)]
    found.append(Peer("reference formulation", reference_formulation, True, quadratic=True))
    found.append(Peer("reference made strong", reference_made_strong, True, quadratic=True))
    found.append(Peer("SDPA, no gates", _sdpa(None), False))
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        found.append(Peer(f"SDPA {name}, no gates", _sdpa(backend), False, absent=None if cuda else "CUDA only"))
    fla = importlib.util.find_spec("fla") is not None
    reason = None if cuda and fla else "the package flash-linear-attention is not installed" if cuda else "CUDA only"
    found.append(Peer("forgetting attention (fla)", forgetting_attention, True, absent=reason))
    return found


def _implementations(device: torch.device) -> list[str]:
    """Our implementations that are meant for the device."""
    here = [row["implementation"] for row in kernels.describe() if row["operation"] == "pruned_attention"]
    return [name for name in here if name == ("triton" if device.type == "cuda" and "triton" in here else "torch")]


def _ours(impl: str) -> Forward:
    def forward(given: Problem) -> tuple[Tensor, Tensor]:
        return kernels.pruned_attention(*given.tensors(), given.alpha, impl=impl)

    return forward


def _sdpa(backend: SDPBackend | None) -> Forward:
    def forward(given: Problem) -> tuple[Tensor, None]:
        grouped = given.query.shape[1] != given.key.shape[1]
        with sdpa_kernel(backend) if backend else nullcontext():
            output = scaled_dot_product_attention(
                given.query, given.key, given.value, is_causal=True, enable_gqa=grouped
            )
        return output, None

    return forward


def reference_formulation(given: Problem) -> tuple[Tensor, Tensor]:
    """The published formulation (arXiv 2305.15805): gates by 25 bisections, n x n float32 tensors throughout."""
    return _product_form(given, _BisectedGate.apply(_logits(given), given.alpha))


def reference_made_strong(given: Problem) -> tuple[Tensor, Tensor]:
    """The same n x n formulation with our exact Newton gates and a running sum of logarithms, through SDPA's mask."""
    log_alive = kernels.log_survival(given.interaction_query, given.interaction_key, given.beta, given.alpha)
    causal = torch.ones(log_alive.shape[-2:], dtype=torch.bool, device=log_alive.device).tril()
    bias = log_alive.masked_fill(~causal, -torch.inf)[:, None].to(given.query.dtype)
    groups = given.query.shape[1] // given.key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (given.key, given.value))
    output = scaled_dot_product_attention(given.query, key, value, attn_mask=bias)
    return output, log_alive.exp().tril(-1).sum((1, 2))


def forgetting_attention(given: Problem) -> tuple[Tensor, None]:
    """The nearest sibling with a fused kernel (arXiv 2503.02130): one decay per query and head, not per pair."""
    from fla.ops.forgetting_attn import parallel_forgetting_attn

    query, key, value = (t.transpose(1, 2) for t in (given.query, given.key, given.value))
    heads, rank = given.query.shape[1], given.interaction_query.shape[-1]
    decay = torch.nn.functional.logsigmoid(given.interaction_query[..., torch.arange(heads) % rank] + given.beta)
    return parallel_forgetting_attn(query, key, value, decay).transpose(1, 2), None


def _logits(given: Problem) -> Tensor:
    product = given.interaction_query @ given.interaction_key.transpose(1, 2)
    return product / math.sqrt(given.interaction_query.shape[-1]) + given.beta


def _product_form(given: Problem, gate: Tensor) -> tuple[Tensor, Tensor]:
    n, groups = gate.shape[-1], given.query.shape[1] // given.key.shape[1]
    below = torch.ones(n, n, dtype=torch.bool, device=gate.device).tril(-1)
    alive = torch.cumprod(torch.where(below, gate, 1.0), 1).tril()
    key, value = (t.repeat_interleave(groups, 1) for t in (given.key, given.value))
    logits = given.query @ key.transpose(2, 3) / math.sqrt(key.shape[-1])
    logits = logits + torch.log(alive.clamp(min=1e-30))[:, None].to(logits.dtype)
    logits = logits.masked_fill(alive[:, None] == 0, -torch.inf)
    return torch.softmax(logits, -1) @ value, alive.tril(-1).sum((1, 2))


class _BisectedGate(torch.autograd.Function):
    """The alpha-sigmoid as published: bisection of the threshold of (x, 0), 25 halvings in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: float) -> Tensor:
        scores = torch.stack([x, torch.zeros_like(x)], -1) * (alpha - 1.0)
        low = scores.amax(-1, keepdim=True) - 1.0
        width = 1.0 - 0.5 ** (alpha - 1.0)
        at_low = ((scores - low).clamp(min=0) ** (1.0 / (alpha - 1.0))).sum(-1, keepdim=True) - 1.0
        for _ in range(25):
            width = width / 2
            share = (scores - (low + width)).clamp(min=0) ** (1.0 / (alpha - 1.0))
            low = torch.where((share.sum(-1, keepdim=True) - 1.0) * at_low >= 0, low + width, low)
        gate = (share / share.sum(-1, keepdim=True))[..., 0]
        ctx.save_for_backward(gate)
        ctx.alpha = alpha
        return gate

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (gate,) = ctx.saved_tensors
        inside = (gate > 0) & (gate < 1)
        safe = torch.where(inside, gate, 0.5)
        slope = 1.0 / (safe ** (ctx.alpha - 2.0) + (1.0 - safe) ** (ctx.alpha - 2.0))
        return torch.where(inside, gradient * slope, 0.0), None
