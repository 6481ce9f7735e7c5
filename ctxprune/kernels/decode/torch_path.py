"""How does one decoding step run on any device? All rows' pages at once, as they lie in the pool: each page is one
matrix, and what belongs to one row is summed after its softmax, so that neither gaps nor ragged rows cost a copy."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ctxprune.kernels.decode.pages import Order, Pages, Slots, order_of


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
    order = order_of(pages.table) if pages.order is None else pages.order
    slots, pages.next = pages.next, None
    if slots is not None:
        _write(key, value, interaction_key, step, guard, drop_time, pages, slots)
        stored, everywhere = None, True
    else:
        stored, everywhere = _store(key, value, interaction_key, step, guard, drop_time, pages)
    now = order.of_pages(step)[:, None]
    times = pages.drop_time[order.pages]
    if interaction_query is not None and pages.interaction is not None and beta is not None:
        x = _logits(pages.interaction[order.pages], order.of_pages(interaction_query), beta)
        dropped = (x <= 0).logical_and_(pages.guard[order.pages] <= now)
        torch.where(dropped, torch.minimum(times, now), times, out=times)
        if not isinstance(order.pages, slice):  # a copy, then
            pages.drop_time[order.pages] = times
    live = times > now
    if stored is not None:
        _find_free(pages, order, live, stored)
    output = attend(query[:, :, None], pages, order, live[:, None], scale).squeeze(2)
    if everywhere or stored is None:
        return output
    # An idle row has nothing to say; one without room must not go unnoticed.
    silent, lost = (step < 0)[:, None, None], ((step >= 0) & ~stored)[:, None, None]
    return output.masked_fill(silent, 0.0).masked_fill(lost, torch.nan)


def _store(key, value, interaction_key, step, guard, drop_time, pages: Pages) -> tuple[Tensor, bool]:
    """Write each row's token into its free slot, else its next one; (rows,) True where there was one, and whether there
    was one in every row."""
    most = pages.table.shape[1]
    slot = torch.where(pages.free >= 0, pages.free, pages.used).long()
    page = pages.table.gather(1, (slot // pages.page).clamp_(max=most - 1)[:, None]).squeeze(1).long()
    place, arrives = slot % pages.page, step >= 0
    stored = arrives & (page >= 0) & (slot < most * pages.page)
    everywhere = bool(stored.all())
    if not everywhere:
        pages.refused += (arrives & ~stored).to(torch.int32)
        page, place, slot = page[stored], place[stored], slot[stored]
        key, value, step, guard, drop_time = (t[stored] for t in (key, value, step, guard, drop_time))
        interaction_key = None if interaction_key is None else interaction_key[stored]
        pages.used[stored] = torch.maximum(pages.used[stored], (slot + 1).to(torch.int32))
    else:
        pages.used.copy_(torch.maximum(pages.used, slot + 1))
    _write(key, value, interaction_key, step, guard, drop_time, pages, Slots(page, place))
    return stored, everywhere


def _write(key, value, interaction_key, step, guard, drop_time, pages: Pages, slots: Slots) -> None:
    page, place = slots.page, slots.place
    pages.keys[page, :, place] = key.to(pages.keys.dtype)
    pages.values[page, :, place] = value.to(pages.values.dtype)
    if interaction_key is not None and pages.interaction is not None:
        pages.interaction[page, place] = interaction_key.to(pages.interaction.dtype)
    pages.guard[page, place], pages.drop_time[page, place], pages.position[page, place] = guard, drop_time, step


def _find_free(pages: Pages, order: Order, live: Tensor, stored: Tensor) -> None:
    """The first slot of each row that is not alive and was taken before, or -1."""
    none = pages.table.shape[1] * pages.page
    first = torch.where(live.all(1), none, order.rank * pages.page + live.to(torch.uint8).argmin(1))
    found = torch.full_like(pages.free, none, dtype=torch.long).scatter_reduce_(0, order.row, first, "amin")
    found = torch.where(found < pages.used, found, -1).to(torch.int32)
    pages.free.copy_(torch.where(stored, found, pages.free))


def _logits(gate_keys: Tensor, gate_query: Tensor, beta: Tensor) -> Tensor:
    """x = ik . iq / sqrt(rank) + beta; gate_keys (pages, page, rank), gate_query (pages, rank) -> (pages, page)."""
    work = torch.float64 if gate_query.dtype == torch.float64 else torch.float32
    scale = 1.0 / math.sqrt(gate_query.shape[-1])
    keys, query = gate_keys.to(work), gate_query.to(work)[:, :, None]
    return torch.baddbmm(beta.to(work), keys, query, alpha=scale).squeeze(-1)


def attend(query: Tensor, pages: Pages, order: Order, seen: Tensor, scale: float) -> Tensor:
    """Queries (rows, heads, n, width), each over the slots that it sees, (pages, n, page), of its row's pages. A query
    that sees nothing gets NaN."""
    keys, values = pages.keys[order.pages], pages.values[order.pages]
    if order.one_each:  # nothing to put together: one call, where a dozen would cost more than a short context does
        own = order.of_pages(query.to(keys.dtype))
        out = scaled_dot_product_attention(own, keys, values, seen[:, None], scale=scale, enable_gqa=True)
        return (out if order.in_order else torch.empty_like(out).index_copy_(0, order.row, out)).to(query.dtype)
    kv_heads, n, work = keys.shape[1], query.shape[2], torch.promote_types(query.dtype, keys.dtype)
    exact = torch.promote_types(work, torch.float32)
    # In 16 bits a logit of 50 would be off by an eighth.
    grouped = (query.to(exact) * scale).unflatten(1, (kv_heads, -1))
    heads = grouped.shape[1:3]
    logits = torch.matmul(order.of_pages(grouped).flatten(2, 3), keys.to(exact).transpose(2, 3))
    logits = logits.unflatten(2, (-1, n)).masked_fill_(~seen[:, None, None], -torch.inf)
    # Softmax over all pages of a row: its largest logit, the sum of the weights, the weighted values.
    top, row = logits.amax(-1), order.row.view(-1, 1, 1, 1).expand(logits.shape[:4])
    largest = top.new_full((len(query), *heads, n), -torch.inf).scatter_reduce_(0, row, top, "amax")
    weights = logits.sub_(largest[order.row][..., None]).exp_()
    total = weights.new_zeros(largest.shape).index_add_(0, order.row, weights.sum(-1))
    part = torch.matmul(weights.flatten(2, 3).to(work), values.to(work)).to(exact).unflatten(2, (-1, n))
    output = part.new_zeros(*largest.shape, values.shape[-1]).index_add_(0, order.row, part)
    return (output / total[..., None]).flatten(1, 2).to(query.dtype)
