"""What is decoding measured against? One more token for a batch of sequences, over pages that hold survivors alone.

On a GPU every peer's step is a CUDA graph, played again: what is timed is the kernels and not the host's launches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ctxprune import kernels
from ctxprune.kernels.decode.pages import NEVER
from pipelines.config import KernelsConfig
from pipelines.kernel_benchmark import clock, pools
from pipelines.kernel_benchmark.formulation import masked
from pipelines.kernel_benchmark.peer import NO_GATES, Peer, Prepared, implementations
from pipelines.kernel_benchmark.problem import Problem, drop_times

MAIN = "step"
"""The only pass."""
EVERY_KEY = ", every key, no gates"
"""How our own kernel is called where its pages hold everything."""
OVER = {"sdpa": NO_GATES, "dense": EVERY_KEY}
"""What our time is divided by; the published formulation has no decoding step of its own."""


def peers(settings: KernelsConfig, device: torch.device, heads: int) -> list[Peer]:
    """Every peer; ours first: over the survivors, then the same kernel over every key."""
    found = []
    for gated, suffix in ((True, ""), (False, EVERY_KEY)):
        exact, plain = partial(ours, "reference", gated), partial(_plain, gated)
        found += [
            Peer(f"ctxprune {impl}{suffix}", partial(ours, impl, gated), gated, exact=exact, plain=plain)
            for impl in implementations("decode_attention", device, settings.dtype)
        ]
    return [*found, Peer(NO_GATES, _sdpa, False)]


@torch.no_grad()
def ours(impl: str, gated: bool, given: Problem) -> Prepared:
    """A step of our own kernel: over the survivors with gates, or over everything without."""
    given = given.inference()
    keep = _kept(given, gated)
    pool = pools.Pool.of(pools.filled(given, keep, gated))
    token = [tensor[:, :, -1].contiguous() for tensor in (given.query, given.key, given.value)]
    gate_query, gate_key = (tensor[:, -1].contiguous() for tensor in given.gates()[:2])
    gates = (gate_query, gate_key, given.beta) if gated else (None, None, None)
    rows, held = keep.shape
    step = torch.full((rows,), held, dtype=torch.int32, device=keep.device)
    guard = given.guard[:, -1].clamp(max=NEVER) if gated and given.guard is not None else None

    def run(pool: pools.Pool) -> list[Tensor]:
        return [kernels.decode_attention(*token, *gates, step, pool.pages, guard=guard, impl=impl)]

    run(pool)
    live = pool.pages.live(step)
    keys = int(live.sum()) * 2 * given.key.shape[1] * given.key.shape[3]
    interaction = int(pool.pages.used.sum()) * given.interaction_key.shape[-1] if gated else 0
    pool.restore()
    facts = {
        "bytes_read": (keys + interaction) * given.key.element_size(),
        "cache_bytes": pools.size(pool.pages),
        "live_share": int(live.sum()) / (rows * (held + 1)),
    }
    turns = [pool, *(pool.copy() for _ in range(pools.copies(facts["cache_bytes"], keep.device) - 1))]

    def left(pool: pools.Pool) -> list[Tensor]:
        return [pool.pages.live(step)]

    # Only Triton's step never waits for the host.
    graph = impl == "triton" and keep.is_cuda
    return _taking_turns(turns, run, facts, graph, restore=pools.Pool.restore, left=left)


def _kept(given: Problem, gated: bool) -> Tensor:
    """The tokens before the last that the pages hold, (batch, n - 1)."""
    if gated:
        return pools.survivors(given)
    return torch.ones_like(given.interaction_key[:, 1:, 0], dtype=torch.bool)


@torch.no_grad()
def _sdpa(given: Problem) -> Prepared:
    """One query over every key, side by side in memory: (batch, kv_heads, n, width)."""
    given = given.inference()
    query = given.query[:, :, -1:]
    held = 2 * given.key.numel() * given.key.element_size()
    count = pools.copies(held, given.key.device)
    turns = [(given.key.contiguous(), given.value.contiguous())]
    turns += [(given.key.clone(), given.value.clone()) for _ in range(count - 1)]

    def run(cache: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [scaled_dot_product_attention(query, *cache, enable_gqa=given.grouped)[:, :, 0]]

    facts = {"bytes_read": held, "cache_bytes": held, "live_share": 1.0}
    return _taking_turns(turns, run, facts, given.key.is_cuda)


@torch.no_grad()
def _plain(gated: bool, given: Problem) -> Prepared:
    """The last query over the keys it sees, operation by operation."""
    given = given.inference()
    seen = torch.ones_like(given.interaction_key[..., 0], dtype=torch.bool)
    if gated:
        seen = drop_times(given, "reference") >= given.key.shape[2]
    return Prepared({MAIN: lambda: [masked(given, seen[:, None])[:, :, 0]]}, left=lambda: [seen.sum(1)])


def _taking_turns(
    turns: list[Any],
    run: Callable[[Any], list[Tensor]],
    facts: dict[str, object],
    graph: bool,
    *,
    restore: Callable[[Any], None] = lambda cache: None,
    left: Callable[[Any], list[Tensor]] = lambda cache: [],
) -> Prepared:
    """A step that takes the next cache each time, restored before."""
    runs, facts = [partial(run, cache) for cache in turns], facts | {"copies": len(turns), "cuda_graph": graph}
    if graph:
        try:
            runs = [clock.captured(step, partial(restore, cache)) for step, cache in zip(runs, turns, strict=True)]
        except RuntimeError as error:
            facts |= {"cuda_graph": False, "no_graph": str(error).split("\n")[0]}
    order = itertools.cycle(zip(turns, runs, strict=True))
    now: list[Any] = []

    def before() -> None:
        now[:] = next(order)
        restore(now[0])

    return Prepared({MAIN: torch.no_grad()(lambda: now[1]())}, before, lambda: left(now[0]), facts)
