"""How does one decoding step run on any device? Row by row over the row's own pages, read where they lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.decode.pages import Pages


def decode_attention(
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
    """Arguments and result as kernels.decode_attention."""
    output = torch.zeros(*query.shape[:2], value.shape[-1], dtype=query.dtype, device=query.device)
    rows = zip(step.tolist(), pages.free.tolist(), pages.used.tolist(), strict=True)
    for row, (now, free, used) in enumerate(rows):
        if now < 0:
            continue
        slot = free if free >= 0 else used
        filled = max(used, slot + 1)
        mine = pages.table[row, : -(-filled // pages.page)].long()
        if filled > pages.table.shape[1] * pages.page or mine[-1] < 0:
            pages.refused[row] += 1
            output[row] = torch.nan
            continue
        page, place = mine[slot // pages.page], slot % pages.page
        pages.keys[page, :, place] = key[row].to(pages.keys.dtype)
        pages.values[page, :, place] = value[row].to(pages.values.dtype)
        pages.guard[page, place], pages.drop_time[page, place] = guard[row], drop_time[row]
        if interaction_key is not None and pages.interaction is not None:
            pages.interaction[page, place] = interaction_key[row].to(pages.interaction.dtype)
        pages.used[row] = filled
        own = _where(mine)
        live = _outlive(pages, own, now, filled, None if interaction_query is None else interaction_query[row], beta)
        pages.free[row] = -1 if bool(live.all()) else int(live.to(torch.uint8).argmin())
        output[row] = _attend(query[row], pages.keys[own], pages.values[own], live, scale)
    return output


def _where(mine: Tensor) -> slice | Tensor:
    """A row's pages: a slice, which copies nothing, when they lie one behind the other."""
    first = int(mine[0])
    follow = torch.arange(first, first + len(mine), device=mine.device)
    return slice(first, first + len(mine)) if torch.equal(mine, follow) else mine


def _outlive(
    pages: Pages, own: slice | Tensor, now: int, filled: int, interaction_query: Tensor | None, beta: Tensor | None
) -> Tensor:
    """Which of a row's `filled` slots its query sees, (filled,), after its gates have dropped what they drop."""
    times = pages.drop_time[own]
    if interaction_query is not None and pages.interaction is not None and beta is not None:
        work = torch.float64 if interaction_query.dtype == torch.float64 else torch.float32
        scale = 1.0 / math.sqrt(len(interaction_query))
        x = (pages.interaction[own].to(work) @ interaction_query.to(work)) * scale + beta.to(work)
        times = torch.where((x <= 0) & (pages.guard[own] <= now) & (times > now), now, times)
        pages.drop_time[own] = times
    return times.view(-1)[:filled] > now


def _attend(query: Tensor, keys: Tensor, values: Tensor, live: Tensor, scale: float) -> Tensor:
    """One query (heads, width) over pages (pages, kv_heads, page, width) as they lie; live: (filled,)."""
    count, kv_heads, page, width = keys.shape
    work = torch.promote_types(query.dtype, keys.dtype)
    grouped = (query.to(work) * scale).view(1, kv_heads, -1, width)
    logits = (grouped @ keys.to(work).transpose(2, 3)).permute(1, 2, 0, 3).reshape(kv_heads, -1, count * page)
    hidden = torch.ones(count * page, dtype=torch.bool, device=live.device)
    hidden[: len(live)] = ~live
    weights = torch.softmax(logits.masked_fill_(hidden, -torch.inf), -1)
    weights = weights.view(kv_heads, -1, count, page).permute(2, 0, 1, 3)
    return (weights @ values.to(work)).sum(0).view(-1, values.shape[-1])
