"""What do a prompt's queries see? Two kernels: each row block's list of keys, then attention over the listed ones."""

from __future__ import annotations

import triton
import triton.language as tl

from ctxprune.kernels.soft_attention.triton_tiles import GONE, VARYING, head_base, load_rows, store_rows


@triton.jit
def _append(todo, filled, key, wanted):
    """Write the wanted keys behind the `filled` ones; returns how many there are then."""
    wanted = wanted.to(tl.int32)
    tl.store(todo + filled + tl.cumsum(wanted, axis=0) - wanted, key, mask=wanted == 1)
    return filled + tl.sum(wanted, axis=0)


@triton.jit(do_not_specialize=VARYING)
def list_kernel(
    drop_time,
    allowed,
    listed,
    whole,
    total,
    first_block,
    n,
    capacity,
    pattern_block,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PATTERN: tl.constexpr,
):
    """Grid: row blocks of the pass x lists (batch * groups). drop_time (lists, n); with PATTERN, allowed
    (blocks of pattern_block queries, n) bytes, 0 for keys that the block may not see.

    Writes listed (lists, blocks, capacity): the keys that every query of the block sees, then those that some see;
    whole and total (lists, blocks): how many of the first, and of both.
    """
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = (first_block + block) * ROWS
    stop = tl.minimum(start + ROWS, n)
    own = group * tl.num_programs(0) + block
    todo = listed + own * capacity
    own_pattern = allowed + (start // pattern_block).to(tl.int64) * n
    filled = 0
    for chunk in range(0, start, CHUNK):
        key = chunk + tl.arange(0, CHUNK)
        time = tl.load(drop_time + group * n + key, mask=key < start, other=0)
        if PATTERN:
            time = tl.where(tl.load(own_pattern + key, mask=key < start, other=0) != 0, time, 0)
        filled = _append(todo, filled, key, time >= stop)
    tl.store(whole + own, filled)
    for chunk in range(0, stop, CHUNK):
        key = chunk + tl.arange(0, CHUNK)
        time = tl.load(drop_time + group * n + key, mask=key < stop, other=0)
        if PATTERN:
            time = tl.where(tl.load(own_pattern + key, mask=key < stop, other=0) != 0, time, 0)
        filled = _append(todo, filled, key, (time > start) & ((time < stop) | (key >= start)))
    tl.store(total + own, filled)


@triton.jit
def _gather(base, row, stride, here, WIDTH: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """The named rows of a matrix, (rows, PADDED); zeros where not `here`."""
    column = tl.arange(0, PADDED)
    place = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    if MASKED:
        return tl.load(place, mask=here[:, None] & (column < WIDTH)[None, :], other=0.0)
    if WIDTH < PADDED:
        return tl.load(place, mask=(column < WIDTH)[None, :], other=0.0)
    return tl.load(place)


@triton.jit
def _attend(
    queries, top, weight_sum, seen, row, todo, place, total, drop_time, key_base, value_base, key_stride, value_stride,
    score_scale, WIDTH: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of the running softmax (arXiv 2205.14135) over listed keys; MASKED: some query does not see some key."""
    entry = place + tl.arange(0, KEYS)
    here = entry < total
    if MASKED:
        key = tl.load(todo + entry, mask=here, other=0)
    else:
        key = tl.load(todo + entry)
    keys = _gather(key_base, key, key_stride, here, WIDTH, PADDED, MASKED)
    values = _gather(value_base, key, value_stride, here, WIDTH, PADDED, MASKED)
    if UPCAST:
        keys, values = keys.to(tl.float32), values.to(tl.float32)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * score_scale
    if MASKED:
        time = tl.load(drop_time + key, mask=here, other=0)
        scores = tl.where((key[None, :] <= row[:, None]) & (row[:, None] < time[None, :]), scores, GONE)
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None])
    if MASKED:
        # A query that has seen nothing yet has GONE for its top, and exp2(GONE - GONE) is 1.
        weights = tl.where(scores > GONE, weights, 0.0)
    fade = tl.exp2(top - new_top)
    weight_sum = weight_sum * fade + tl.sum(weights, axis=1)
    seen = tl.dot(weights.to(values.dtype), values, seen * fade[:, None], input_precision=PRECISION)
    return new_top, weight_sum, seen


@triton.jit(do_not_specialize=VARYING)
def prefill_kernel(
    query,
    key,
    value,
    output,
    drop_time,
    listed,
    whole,
    total,
    query_batch_stride,
    query_head_stride,
    query_stride,
    key_batch_stride,
    key_head_stride,
    key_stride,
    value_batch_stride,
    value_head_stride,
    value_stride,
    heads,
    groups,
    lists,
    n,
    first_block,
    blocks,
    capacity,
    score_scale,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One row block of one head. Grid: heads (fastest: they gather the same keys) x row blocks of the pass x batch.

    lists: lists per sequence, 1 or one per key/value head. Writes output (batch, heads, n, WIDTH).
    """
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    block = blocks - 1 - tl.program_id(1)  # the longest first
    row = (first_block + block) * ROWS + tl.arange(0, ROWS)
    kv_head = head // groups
    group = batch * lists + tl.minimum(kv_head, lists - 1)
    key_base = head_base(key, batch, key_batch_stride, kv_head, key_head_stride)
    value_base = head_base(value, batch, value_batch_stride, kv_head, value_head_stride)
    query_base = head_base(query, batch, query_batch_stride, head, query_head_stride)
    queries = load_rows(query_base, row, query_stride, n, WIDTH, PADDED, UPCAST)
    own = group * blocks + block
    todo, times = listed + own * capacity, drop_time + group * n
    count = tl.load(total + own)
    unmasked = tl.load(whole + own) // KEYS * KEYS
    top = tl.full([ROWS], GONE, tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    seen = tl.zeros([ROWS, PADDED], tl.float32)
    for place in range(0, unmasked, KEYS):
        top, weight_sum, seen = _attend(
            queries, top, weight_sum, seen, row, todo, place, count, times, key_base, value_base, key_stride,
            value_stride, score_scale, WIDTH, PADDED, KEYS, False, PRECISION, UPCAST,
        )  # fmt: skip
    for place in range(unmasked, count, KEYS):
        top, weight_sum, seen = _attend(
            queries, top, weight_sum, seen, row, todo, place, count, times, key_base, value_base, key_stride,
            value_stride, score_scale, WIDTH, PADDED, KEYS, True, PRECISION, UPCAST,
        )  # fmt: skip
    weight_sum = tl.where(weight_sum == 0.0, 1.0, weight_sum)  # rows beyond n have seen nothing
    own_output = output + (batch * heads + head) * n * WIDTH
    store_rows(own_output, row, WIDTH, n, seen / weight_sum[:, None], WIDTH, PADDED)
