"""What is training measured against? The same inputs for all: a forward pass, and one with every gradient."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ctxprune import kernels
from pipelines.config import KernelsConfig
from pipelines.kernel_benchmark.formulation import plain_formulation, reference_formulation, reference_made_strong
from pipelines.kernel_benchmark.peer import NO_GATES, REFERENCE, Peer, Prepare, Prepared, implementations
from pipelines.kernel_benchmark.problem import Problem

MAIN = "both"
"""The pass that is compared: forward and backward."""
OVER = {"sdpa": NO_GATES, "reference": REFERENCE}
"""What our time is divided by."""
HEAD_BYTES = 20
"""Bytes per head and pair of tokens: about five float32 tensors of n x n with their gradients."""

Forward = Callable[[Problem], tuple[Tensor, Tensor | None]]
"""Output, and the sum of I where the peer has gates."""


def peers(settings: KernelsConfig, device: torch.device, heads: int) -> list[Peer]:
    """Every peer, those that cannot run here with the reason; ours first."""
    square = HEAD_BYTES * heads
    exact, plain = trained(ours("reference"), True), trained(plain_formulation, True)
    found = [
        Peer(f"ctxprune {impl}", trained(ours(impl), True), True, exact=exact, plain=plain)
        for impl in implementations("pruned_attention", device)
    ]
    found.append(Peer(REFERENCE, trained(reference_formulation, True), True, pair_bytes=square))
    found.append(Peer("reference made strong", trained(reference_made_strong, True), True, pair_bytes=square))
    found += [
        Peer(name, trained(lambda given, run=run: (run(given), None), False), False, absent=absent)
        for name, run, absent in dense(device)
    ]
    fla = importlib.util.find_spec("fla") is not None
    reason = None if fla else "the package flash-linear-attention is not installed"
    absent = reason if device.type == "cuda" else "CUDA only"
    found.append(Peer("forgetting attention (fla)", trained(forgetting_attention, True), True, absent=absent))
    return found


def dense(device: torch.device) -> list[tuple[str, Callable[[Problem], Tensor], str | None]]:
    """Attention without gates: name, forward pass, why it cannot run here. PyTorch's own choice first."""
    absent = None if device.type == "cuda" else "CUDA only"
    return [
        (NO_GATES, partial(_sdpa, None), None),
        ("SDPA flash, no gates", partial(_sdpa, SDPBackend.FLASH_ATTENTION), absent),
        ("SDPA cuDNN, no gates", partial(_sdpa, SDPBackend.CUDNN_ATTENTION), absent),
    ]


def _sdpa(backend: SDPBackend | None, given: Problem) -> Tensor:
    with sdpa_kernel(backend) if backend else nullcontext():
        return scaled_dot_product_attention(
            given.query, given.key, given.value, is_causal=True, enable_gqa=given.grouped
        )


def ours(impl: str) -> Forward:
    """Pruned attention by one implementation."""

    def forward(given: Problem) -> tuple[Tensor, Tensor]:
        return kernels.pruned_attention(*given.tensors(), given.alpha, guard=given.guard, end=given.end, impl=impl)

    return forward


def trained(forward: Forward, gated: bool) -> Prepare:
    """The passes of a training step: forward alone, and with every gradient."""

    def prepare(given: Problem) -> Prepared:
        @torch.no_grad()
        def alone() -> list[Tensor]:
            return [forward(given)[0]]

        def both() -> list[Tensor]:
            """Output and gradients of a loss that weighs every output differently."""
            out, alive = forward(given)
            weight = torch.linspace(-1.0, 1.0, out.shape[-1], device=out.device, dtype=out.dtype)
            loss = (out * weight).sum() + (0.1 * alive.sum() if alive is not None else 0.0)
            wanted = given.tensors() if gated else given.tensors()[:3]
            return [out.detach(), *torch.autograd.grad(loss, wanted)]

        return Prepared({"forward": alone, "both": both})

    return prepare


def forgetting_attention(given: Problem) -> tuple[Tensor, None]:
    """The nearest sibling with a fused kernel (arXiv 2503.02130): one decay per query and head, not per pair."""
    from fla.ops.forgetting_attn import parallel_forgetting_attn

    query, key, value = (t.transpose(1, 2) for t in (given.query, given.key, given.value))
    heads, rank = given.query.shape[1], given.interaction_query.shape[-1]
    decay = torch.nn.functional.logsigmoid(given.interaction_query[..., torch.arange(heads) % rank] + given.beta)
    return parallel_forgetting_attn(query, key, value, decay).transpose(1, 2), None
