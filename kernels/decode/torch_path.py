"""How does one decoding step run on any device? All rows at once over copies of their pages while these are small, else
row by row over the row's own pages, read where they lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.decode.pages import Pages

TOGETHER = 1 << 16
"""Numbers (keys and values of a row) up to which copying them costs less than a row's own calls (2 cores: 32 rows of
4,000 numbers 0.4 ms together, 3.3 ms one by one; 8 rows of 200,000 numbers the other way round)."""


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
    longest = -(-int(pages.used.max() + 1) // pages.page)
    if 2 * longest * pages.keys[0].numel() <= TOGETHER:
        return _together(
            query, key, value, interaction_query, interaction_key, beta, step, guard, drop_time, pages, scale
        )
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


def _together(
    query, key, value, interaction_query, interaction_key, beta, step, guard, drop_time, pages: Pages, scale: float
) -> Tensor:
    """The same for all rows at once."""
    row, most = torch.arange(len(query), device=query.device), pages.table.shape[1]
    slot = torch.where(pages.free >= 0, pages.free, pages.used).long()
    page = pages.table[row, (slot // pages.page).clamp(max=most - 1)].long()
    room, arrives = (slot < most * pages.page) & (page >= 0), step >= 0
    pages.refused += (arrives & ~room).to(torch.int32)
    stored = arrives & room
    page, place = page[stored], slot[stored] % pages.page
    pages.keys[page, :, place] = key[stored].to(pages.keys.dtype)
    pages.values[page, :, place] = value[stored].to(pages.values.dtype)
    pages.guard[page, place], pages.drop_time[page, place] = guard[stored], drop_time[stored]
    if interaction_key is not None and pages.interaction is not None:
        pages.interaction[page, place] = interaction_key[stored].to(pages.interaction.dtype)
    filled = torch.where(stored, torch.maximum(pages.used, slot + 1), pages.used).to(torch.int32)
    pages.used.copy_(filled)
    mine = pages.table[:, : max(1, -(-int(filled.max()) // pages.page))].long()
    own, theirs = mine.clamp(min=0), (mine >= 0) & stored[:, None]
    times, now = pages.drop_time[own], step[:, None, None]
    if interaction_query is not None and pages.interaction is not None:
        x = _logits(pages.interaction[own], interaction_query[:, None, :, None], beta)
        times = torch.where((x <= 0) & (pages.guard[own] <= now) & (times > now), now, times)
        pages.drop_time[mine[theirs]] = times[theirs]
    taken = torch.arange(own.shape[1] * pages.page, device=query.device) < filled[:, None]
    live = taken & (times.flatten(1) > step[:, None])
    gone = taken & ~live
    first = torch.where(gone.any(1), gone.to(torch.uint8).argmax(1), -1).to(torch.int32)
    pages.free.copy_(torch.where(stored, first, pages.free))
    keys, values = (tensor[own].transpose(1, 2).flatten(2, 3) for tensor in (pages.keys, pages.values))
    work = torch.promote_types(query.dtype, keys.dtype)
    grouped = (query.to(work) * scale).unflatten(1, (keys.shape[1], -1))
    logits = (grouped @ keys.to(work).transpose(2, 3)).masked_fill_(~live[:, None, None], -torch.inf)
    seen = (torch.softmax(logits, -1) @ values.to(work)).flatten(1, 2).to(query.dtype)
    return seen.masked_fill(~arrives[:, None, None], 0.0).masked_fill((arrives & ~room)[:, None, None], torch.nan)


def _logits(gate_keys: Tensor, gate_query: Tensor, beta: Tensor) -> Tensor:
    """x = ik . iq / sqrt(rank) + beta; gate_keys (..., rank), gate_query (..., rank, 1)."""
    work = torch.float64 if gate_query.dtype == torch.float64 else torch.float32
    scale = 1.0 / math.sqrt(gate_query.shape[-2])
    return (gate_keys.to(work) @ gate_query.to(work)).squeeze(-1) * scale + beta.to(work)


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
        x = _logits(pages.interaction[own], interaction_query[:, None], beta)
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
