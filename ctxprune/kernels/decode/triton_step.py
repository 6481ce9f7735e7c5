"""What does one decoding step compute on a GPU? The token is stored, each live slot read once in splits, these merged.

Which slot the token takes follows from `free` and `used`. Only the last kernel changes these, so that all three agree.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ctxprune.kernels.soft_attention.triton_tiles import GONE

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
    positions,
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
    now = tl.load(step + row)
    if now >= 0:
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
                tl.store(positions + place, now)
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
    # Shares that differ by one page at most: rounded up, they would leave the last splits without work.
    for place in range(split * page_count // splits, (split + 1) * page_count // splits):
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
