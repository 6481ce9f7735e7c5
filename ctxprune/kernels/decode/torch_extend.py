"""How do several tokens at once join rows that have context already? A chunk of a prompt, or drafts to be verified.

All are stored first; then each query sees what was born no later than itself and is not dropped yet. Queries are taken
in blocks, so that the numbers in flight are a block's and not a chunk's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctxprune.kernels.decode.pages import NEVER, Pages, order_of
from ctxprune.kernels.decode.torch_path import attend

BLOCK = 64
"""Queries at a time."""


def extend_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    interaction_query: Tensor | None,
    interaction_key: Tensor | None,
    beta: Tensor | None,
    step: Tensor,
    guard: Tensor,
    drop_time: Tensor,
    pages: Pages,
    scale: float,
) -> Tensor:
    """Arguments and result as kernels.extend_attention."""
    pages.store(key, value, interaction_key, step, guard, drop_time)
    order = order_of(pages.table) if pages.order is None else pages.order
    position, times = pages.position[order.pages], pages.drop_time[order.pages]
    guards, outputs = pages.guard[order.pages], []
    for start in range(0, query.shape[2], BLOCK):
        block = slice(start, start + BLOCK)
        now = step[:, block][order.row][:, None]  # (pages, 1, queries)
        if interaction_query is not None and pages.interaction is not None and beta is not None:
            x = _logits(pages.interaction[order.pages], interaction_query[:, block][order.row], beta)
            dropped = torch.where((x <= 0) & (guards[..., None] <= now), now, NEVER).amin(-1)
            times = torch.minimum(times, dropped)
        seen = (position[..., None] <= now) & (times[..., None] > now)
        outputs.append(attend(query[:, :, block], pages, order, seen.transpose(1, 2), scale))
    pages.drop_time[order.pages] = times
    return torch.cat(outputs, 2).masked_fill((step < 0)[:, None, :, None], 0.0)


def _logits(gate_keys: Tensor, gate_queries: Tensor, beta: Tensor) -> Tensor:
    """x; gate_keys (pages, page, rank), gate_queries (pages, queries, rank) -> (pages, page, queries)."""
    work = torch.float64 if gate_queries.dtype == torch.float64 else torch.float32
    scale = 1.0 / math.sqrt(gate_queries.shape[-1])
    return torch.bmm(gate_keys.to(work), gate_queries.to(work).mul(scale).transpose(1, 2)) + beta.to(work)
