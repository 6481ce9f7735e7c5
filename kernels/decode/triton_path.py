"""How does one decoding step run on a GPU? Store the token, read each live slot once in parallel splits, combine.

Three launches of a fixed grid; how many slots a row has is read on the device. Nothing waits for the host, so that a
step can be captured in a CUDA graph and played again.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead_of_time import Shipped
from kernels.decode.pages import Pages
from kernels.sigmoid.triton_path import check_device, interpreted, on_device
from kernels.soft_attention.triton_tiles import GONE

WIDEST = 128
"""Numbers per head; wider ones would spill."""

PROGRAMS = 528
"""Programs that keep the memory of the GPUs we know busy (132 multiprocessors, four each)."""

MOST_SPLITS = 64
"""Splits of a row at most: the last kernel reads one running softmax each."""

WARPS, STAGES = 4, 3

NO_SLOT = tl.constexpr(2147483647)


@triton.jit
def _slot(used, free, table, most, row, PAGE: tl.constexpr):
    """(slot, its page or -1, slots in use) of the token that row is about to store."""
    taken = tl.load(used + row)
    again = tl.load(free + row)
    slot = tl.where(again >= 0, again, taken)
    page = tl.load(table + row * most + slot // PAGE, mask=slot < most * PAGE, other=-1)
    return slot, page, tl.where(page >= 0, tl.maximum(taken, slot + 1), taken)


@triton.jit
def store_kernel(
    key,
    value,
    interaction_key,
    step,
    guard,
    drop_time,
    keys,
    values,
    interactions,
    drop_times,
    guards,
    table,
    used,
    free,
    refused,
    kv_heads,
    most,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    PAGE: tl.constexpr,
    GATED: tl.constexpr,
):
    """Store each row's token in its slot. Grid: key/value heads x rows. key, value (rows, kv_heads, WIDTH)."""
    head, row = tl.program_id(0), tl.program_id(1)
    if tl.load(step + row) >= 0:
        slot, page, _ = _slot(used, free, table, most, row, PAGE)
        if page >= 0:
            place = page.to(tl.int64) * PAGE + slot % PAGE
            column = tl.arange(0, PADDED)
            own = (row * kv_heads + head) * WIDTH + column
            there = ((page.to(tl.int64) * kv_heads + head) * PAGE + slot % PAGE) * WIDTH + column
            tl.store(keys + there, tl.load(key + own, mask=column < WIDTH), mask=column < WIDTH)
            tl.store(values + there, tl.load(value + own, mask=column < WIDTH), mask=column < WIDTH)
            if head == 0:
                tl.store(guards + place, tl.load(guard + row))
                tl.store(drop_times + place, tl.load(drop_time + row))
                if GATED:
                    number = tl.arange(0, PADDED_RANK)
                    gate = tl.load(interaction_key + row * RANK + number, mask=number < RANK)
                    tl.store(interactions + place * RANK + number, gate, mask=number < RANK)
        elif head == 0:
            tl.store(refused + row, tl.load(refused + row) + 1)


@triton.jit
def split_kernel(
    query,
    interaction_query,
    beta,
    step,
    keys,
    values,
    interactions,
    drop_times,
    guards,
    table,
    used,
    free,
    split_top,
    split_sum,
    split_seen,
    split_free,
    kv_heads,
    most,
    splits,
    score_scale,
    gate_scale,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    PAGE: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Gates, drops and a running softmax over one split of a row's pages. Grid: splits x key/value heads x rows.

    Every head decides for itself, from the same numbers in the same order; the first one writes the drops down. Writes
    split_top, split_sum (rows, kv_heads, GROUPS, splits), split_seen (the same, WIDTH) and split_free (rows, splits),
    the split's first slot that is free.
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    now = tl.load(step + row)
    _, stored, count = _slot(used, free, table, most, row, PAGE)
    # A row that is idle or was refused reads nothing.
    page_count = tl.where((now >= 0) & (stored >= 0), tl.cdiv(count, PAGE), 0)
    share = tl.cdiv(page_count, splits)
    column, slot, group = tl.arange(0, PADDED), tl.arange(0, PAGE), tl.arange(0, PADDED_GROUPS)
    own = (row * kv_heads + head) * GROUPS + group
    wide = column < WIDTH
    queries = tl.load(
        query + own[:, None] * WIDTH + column[None, :], mask=(group < GROUPS)[:, None] & wide[None, :], other=0.0
    )
    number = tl.arange(0, PADDED_RANK)
    if GATED:
        gate_query = tl.load(interaction_query + row * RANK + number, mask=number < RANK, other=0.0).to(tl.float32)
        offset = tl.load(beta).to(tl.float32)
    top = tl.full([PADDED_GROUPS], GONE, tl.float32)
    weight_sum = tl.zeros([PADDED_GROUPS], tl.float32)
    seen = tl.zeros([PADDED_GROUPS, PADDED], tl.float32)
    first_free = tl.full([PAGE], NO_SLOT, tl.int32)
    for place in range(split * share, tl.minimum((split + 1) * share, page_count)):
        page = tl.load(table + row * most + place).to(tl.int64)
        taken = place * PAGE + slot < count
        time = tl.load(drop_times + page * PAGE + slot, mask=taken, other=0)
        before = time > now
        live = before
        # Only what lives is read; asked of the state before this step's gates, whose answer the loads need not await.
        there = ((page * kv_heads + head) * PAGE + slot)[:, None] * WIDTH + column[None, :]
        page_keys = tl.load(keys + there, mask=before[:, None] & wide[None, :], other=0.0)
        page_values = tl.load(values + there, mask=before[:, None] & wide[None, :], other=0.0)
        if GATED:
            gate_keys = tl.load(
                interactions + (page * PAGE + slot)[:, None] * RANK + number[None, :],
                mask=before[:, None] & (number < RANK)[None, :],
                other=0.0,
            ).to(tl.float32)
            x = tl.sum(gate_keys * gate_query[None, :], axis=1) * gate_scale + offset
            dropped = before & (x <= 0) & (tl.load(guards + page * PAGE + slot, mask=before, other=0) <= now)
            tl.store(drop_times + page * PAGE + slot, tl.full([PAGE], 0, tl.int32) + now, mask=dropped & (head == 0))
            live = before & ~dropped
        first_free = tl.minimum(first_free, tl.where(taken & ~live, place * PAGE + slot, NO_SLOT))
        if UPCAST:
            page_keys, page_values = page_keys.to(tl.float32), page_values.to(tl.float32)
        scores = tl.dot(queries.to(page_keys.dtype), tl.trans(page_keys), input_precision=PRECISION) * score_scale
        scores = tl.where(live[None, :], scores, GONE)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # A split that has seen nothing yet has GONE for its top, and exp2(GONE - GONE) is 1.
        weights = tl.where(live[None, :], tl.exp2(scores - new_top[:, None]), 0.0)
        fade = tl.exp2(top - new_top)
        weight_sum = weight_sum * fade + tl.sum(weights, axis=1)
        seen = tl.dot(weights.to(page_values.dtype), page_values, seen * fade[:, None], input_precision=PRECISION)
        top = new_top
    # A token that found no room is an answer that is not a number, not a wrong one.
    weight_sum = tl.where((now >= 0) & (stored < 0), float("nan"), weight_sum)
    mine = own * splits + split
    tl.store(split_top + mine, top, mask=group < GROUPS)
    tl.store(split_sum + mine, weight_sum, mask=group < GROUPS)
    there = mine[:, None] * WIDTH + column[None, :]
    tl.store(split_seen + there, seen, mask=(group < GROUPS)[:, None] & wide[None, :])
    if head == 0:
        tl.store(split_free + row * splits + split, tl.min(first_free, axis=0))


@triton.jit
def combine_kernel(
    output,
    split_top,
    split_sum,
    split_seen,
    split_free,
    step,
    table,
    used,
    free,
    heads,
    most,
    splits,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Merge the splits of one head; the first head notes which slot the row takes next. Grid: heads x rows.

    output (rows, heads, WIDTH): zeros for an idle row, NaN for a token that found no room.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    number, column = tl.arange(0, SPLITS), tl.arange(0, PADDED)
    there = number < splits
    own = (row * heads + head) * splits + number
    top = tl.load(split_top + own, mask=there, other=GONE)
    share = tl.exp2(top - tl.max(top, axis=0))
    weight_sum = tl.sum(share * tl.load(split_sum + own, mask=there, other=0.0), axis=0)
    seen = tl.load(
        split_seen + own[:, None] * WIDTH + column[None, :], mask=there[:, None] & (column < WIDTH)[None, :], other=0.0
    )
    result = tl.sum(share[:, None] * seen, axis=0) / tl.where(weight_sum == 0.0, 1.0, weight_sum)
    place = output + (row * heads + head) * WIDTH + column
    tl.store(place, result.to(output.dtype.element_ty), mask=column < WIDTH)
    if head == 0:
        _, page, count = _slot(used, free, table, most, row, PAGE)
        if (tl.load(step + row) >= 0) & (page >= 0):
            first = tl.min(tl.load(split_free + row * splits + number, mask=there, other=NO_SLOT), axis=0)
            tl.store(free + row, tl.where(first == NO_SLOT, -1, first))
            tl.store(used + row, count)


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
    *,
    splits: int | None = None,
) -> Tensor:
    """Arguments and result as kernels.decode_attention; splits: programs that share a row's pages (by default as
    many as fill a GPU).

    Raises ValueError for float64, heads wider than 128, and a device that has no Triton.
    """
    check_device(query)
    if torch.float64 in (query.dtype, pages.keys.dtype):
        raise ValueError("float64 input: Triton computes in float32; take impl='torch'")
    rows, heads, width = query.shape
    if width > WIDEST:
        raise ValueError(f"query has width {width}; Triton takes 1 to {WIDEST}: take impl='torch'")
    kv_heads, most, gated = key.shape[1], pages.table.shape[1], interaction_query is not None
    groups = heads // kv_heads
    splits = _splits(rows * kv_heads, most) if splits is None else splits
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    new = {"dtype": torch.float32, "device": query.device}
    split_top, split_sum = torch.empty(2, rows, heads, splits, **new)
    split_seen = torch.empty(rows, heads, splits, width, **new)
    split_free = torch.empty(rows, splits, dtype=torch.int32, device=query.device)
    query, key, value, step, guard, drop_time = (t.contiguous() for t in (query, key, value, step, guard, drop_time))
    # Without gates some pointer must stand in; nothing reads it.
    gate_query, gate_key, gate_keys, offset = (
        (interaction_query.contiguous(), interaction_key.contiguous(), pages.interaction, beta)
        if gated
        else (query, key, pages.keys, query)
    )
    rank = gate_query.shape[-1] if gated else 16
    state = (pages.table, pages.used, pages.free)
    widths = _widths(width, pages.page)
    ranks = {"RANK": rank, "PADDED_RANK": max(16, triton.next_power_of_2(rank)), "GATED": gated}
    with on_device(query):
        store_kernel[(kv_heads, rows)](
            key, value, gate_key, step, guard, drop_time, pages.keys, pages.values, gate_keys, pages.drop_time,
            pages.guard, *state, pages.refused, kv_heads, most, **widths, **ranks, num_warps=1,
        )  # fmt: skip
        split_kernel[(splits, kv_heads, rows)](
            query, gate_query, offset, step, pages.keys, pages.values, gate_keys, pages.drop_time, pages.guard,
            *state, split_top, split_sum, split_seen, split_free, kv_heads, most, splits, scale * math.log2(math.e),
            1.0 / math.sqrt(rank), **widths, **ranks, **_groups(groups, pages.keys.dtype), num_warps=WARPS,
            num_stages=STAGES,
        )  # fmt: skip
        combine_kernel[(heads, rows)](
            output, split_top, split_sum, split_seen, split_free, step, *state, heads, most, splits, **widths,
            SPLITS=triton.next_power_of_2(splits), num_warps=WARPS,
        )  # fmt: skip
    return output


def _splits(programs: int, most: int) -> int:
    """Splits per row: no more than it may have pages, and none needed where rows and heads fill the GPU."""
    return max(1, min(most, MOST_SPLITS, triton.cdiv(PROGRAMS, programs)))


def _widths(width: int, page: int) -> dict[str, object]:
    return {"WIDTH": width, "PADDED": max(16, triton.next_power_of_2(width)), "PAGE": page}


def _groups(groups: int, dtype: torch.dtype) -> dict[str, object]:
    """Query heads per key/value head, padded to what tensor cores take."""
    exact = dtype == torch.float32 or torch.version.hip is not None
    return {
        "GROUPS": groups,
        "PADDED_GROUPS": max(16, triton.next_power_of_2(groups)),
        "PRECISION": "ieee" if exact else "tf32",
        "UPCAST": interpreted() and dtype == torch.bfloat16,
    }


def shipped() -> list[Shipped]:
    """Pages of 64 at every width in bfloat16, gated by rank 64 and, at width 64, not gated."""
    found = []
    integers = ("step", "drop_times", "guards", "table", "used", "free")
    for width, gated in ((32, True), (64, True), (64, False), (80, True), (96, True), (128, True)):
        widths, name = _widths(width, 64), f"width={width} {'gated' if gated else 'no gates'}"
        ranks = {"RANK": 64, "PADDED_RANK": 64, "GATED": gated}
        found += [
            Shipped(
                f"decode store_kernel {name}",
                store_kernel,
                {
                    **dict.fromkeys(("key", "value", "interaction_key", "keys", "values", "interactions"), "*bf16"),
                    **dict.fromkeys((*integers, "guard", "drop_time", "refused"), "*i32"),
                    **dict.fromkeys(("kv_heads", "most"), "i32"),
                },
                {**widths, **ranks},
                1,
                3,
            ),
            Shipped(
                f"decode split_kernel {name}",
                split_kernel,
                {
                    **dict.fromkeys(("query", "interaction_query", "beta", "keys", "values", "interactions"), "*bf16"),
                    **dict.fromkeys((*integers, "split_free"), "*i32"),
                    **dict.fromkeys(("split_top", "split_sum", "split_seen"), "*fp32"),
                    **dict.fromkeys(("kv_heads", "most", "splits"), "i32"),
                    **dict.fromkeys(("score_scale", "gate_scale"), "fp32"),
                },
                {**widths, **ranks, **_groups(1, torch.bfloat16), "UPCAST": False},
                WARPS,
                STAGES,
            ),
            Shipped(
                f"decode combine_kernel {name}",
                combine_kernel,
                {
                    "output": "*bf16",
                    **dict.fromkeys(("split_top", "split_sum", "split_seen"), "*fp32"),
                    **dict.fromkeys(("split_free", "step", "table", "used", "free"), "*i32"),
                    **dict.fromkeys(("heads", "most", "splits"), "i32"),
                },
                {**widths, "SPLITS": 16},
                WARPS,
                3,
            ),
        ]
    return found
