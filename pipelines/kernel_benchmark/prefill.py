"""What is prefill measured against? A prompt's pass under the step function, from gates to outputs, without gradients.

Ours finds the drop times inside the clock. Every other peer with gates gets them for nothing, and what it builds from
them (masks, an order of the keys) is inside the clock.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ctxprune import kernels
from pipelines.config import KernelsConfig
from pipelines.kernel_benchmark import flex
from pipelines.kernel_benchmark.formulation import masked, reference_step, visible_pairs
from pipelines.kernel_benchmark.peer import NO_GATES, REFERENCE, Peer, Prepare, Prepared, implementations
from pipelines.kernel_benchmark.problem import Problem, drop_times
from pipelines.kernel_benchmark.training import HEAD_BYTES, dense

MAIN = "forward"
"""The only pass."""
OVER = {"sdpa": NO_GATES, "reference": REFERENCE}
"""What our time is divided by."""
MASK_BYTES = 6
"""Bytes per pair of tokens of a boolean mask and of what SDPA turns it into."""


def peers(settings: KernelsConfig, device: torch.device, heads: int) -> list[Peer]:
    """Every peer, those that cannot run here with the reason; ours first."""
    exact, plain = passed(partial(ours, "reference")), passed(_plain)
    found = [
        Peer(f"ctxprune {impl}", passed(partial(ours, impl)), True, exact=exact, plain=plain)
        for impl in implementations("drop_time_attention", device)
    ]
    found.append(Peer(REFERENCE, passed(reference_step), True, pair_bytes=HEAD_BYTES * heads))
    found += [Peer(name, passed(run), False, absent=absent) for name, run, absent in dense(device)]
    found.append(Peer("SDPA, n x n mask", sdpa_with_mask, True, pair_bytes=MASK_BYTES))
    absent = None
    if device.type != "cuda" and not settings.flex:
        absent = "on a CPU only with kernels.flex=true: forward only there, and its first compile takes up to a minute"
    for name, prepare in (("in place", flex.in_place), ("keys sorted", flex.keys_sorted)):
        found.append(Peer(f"FlexAttention, {name}", prepare, True, compiles=True, absent=absent))
    return found


def ours(impl: str, given: Problem) -> Tensor:
    """Drop times, then attention under them."""
    times = drop_times(given, impl)
    return kernels.drop_time_attention(given.query, given.key, given.value, times, impl=impl)


def passed(run: Callable[[Problem], Tensor]) -> Prepare:
    """One pass without gradients."""

    def prepare(given: Problem) -> Prepared:
        given = given.inference()
        return Prepared({MAIN: torch.no_grad()(lambda: [run(given)])})

    return prepare


def sdpa_with_mask(given: Problem) -> Prepared:
    """The mask of the drop times, through SDPA."""
    given = given.inference()
    times = drop_times(given)

    @torch.no_grad()
    def run() -> list[Tensor]:
        mask = visible_pairs(times)[:, None]
        qkv = (given.query, given.key, given.value)
        return [scaled_dot_product_attention(*qkv, attn_mask=mask, enable_gqa=given.grouped)]

    return Prepared({MAIN: run})


def _plain(given: Problem) -> Tensor:
    return masked(given, visible_pairs(drop_times(given, "reference")))
