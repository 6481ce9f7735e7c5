"""What does the loss want of queries, keys and values? The backward pass of attention, and the gradient by log I.

With P the softmax weights and dP = dO V^T, the gradient by the logits is dS = P (dP - delta), delta = sum of O dO.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ctxprune.kernels.ahead_of_time import FAMILIES, Shipped
from ctxprune.kernels.soft_attention.triton_forward import NUMBERS, STRIDES, bias_signature
from ctxprune.kernels.soft_attention.triton_shape import DTYPES, TRAINED, Variant, attention_constants
from ctxprune.kernels.soft_attention.triton_tiles import (
    VARYING,
    add_rows,
    head_base,
    load_bias,
    load_columns,
    load_rows,
    store_rows,
    tile_base,
)

NO_ROW = tl.constexpr(1e30)
"""log2 of the softmax's denominator for rows beyond the last: makes every weight of theirs exactly 0."""


@triton.jit
def _query_tile(
    gradient, queries, d_seen, log_sum, delta, key_base, value_base, key, key_stride, value_stride, n, carry, local,
    score_scale, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CHANGING: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """gradient + dS K of one tile."""
    keys = load_columns(key_base, key, key_stride, n, WIDTH, PADDED, UPCAST)
    values = load_columns(value_base, key, value_stride, n, WIDTH, PADDED, UPCAST)
    scores = tl.dot(queries, keys, input_precision=PRECISION) * score_scale + tl.load(carry + key)[None, :]
    if CHANGING:
        scores += load_bias(local, ROWS, KEYS, False)
    weights = tl.exp2(scores - log_sum[:, None])
    d_scores = weights * (tl.dot(d_seen, values, input_precision=PRECISION) - delta[:, None])
    return tl.dot(d_scores.to(keys.dtype), tl.trans(keys), gradient, input_precision=PRECISION)


@triton.jit(do_not_specialize=VARYING)
def query_gradient_kernel(
    query, key, value, output, d_output, log_sum, delta, d_query, carries, local, order, mixed, constant,
    query_batch_stride, query_head_stride, query_stride, key_batch_stride, key_head_stride, key_stride,
    value_batch_stride, value_head_stride, value_stride, d_output_batch_stride, d_output_head_stride, d_output_stride,
    heads, groups, n, first_block, row_blocks, blocks, key_blocks, score_scale, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d_query and delta of one row block of one head; grid and lists as attention_kernel."""
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    block = blocks - 1 - tl.program_id(1)
    row = (first_block + block) * ROWS + tl.arange(0, ROWS)
    kv_head = head // groups
    query_base = head_base(query, batch, query_batch_stride, head, query_head_stride)
    key_base = head_base(key, batch, key_batch_stride, kv_head, key_head_stride)
    value_base = head_base(value, batch, value_batch_stride, kv_head, value_head_stride)
    d_seen_base = head_base(d_output, batch, d_output_batch_stride, head, d_output_head_stride)
    carry = carries + (batch * row_blocks + first_block + block) * (key_blocks * KEYS)
    own = (batch * heads + head) * n
    queries = load_rows(query_base, row, query_stride, n, WIDTH, PADDED, UPCAST)
    d_seen = load_rows(d_seen_base, row, d_output_stride, n, WIDTH, PADDED, UPCAST)
    seen = load_rows(output + own * WIDTH, row, WIDTH, n, WIDTH, PADDED, UPCAST)
    row_delta = tl.sum(seen.to(tl.float32) * d_seen.to(tl.float32), axis=1)
    row_sum = tl.load(log_sum + own + row, mask=row < n, other=NO_ROW)
    gradient = tl.zeros([ROWS, PADDED], tl.float32)
    changing = tl.load(mixed + batch * blocks + block)
    todo = order + (batch * blocks + block) * key_blocks
    for place in range(changing):
        key_block = tl.load(todo + place)
        tile = tile_base(local, batch, blocks, block, key_blocks, key_block, ROWS, KEYS)
        gradient = _query_tile(
            gradient, queries, d_seen, row_sum, row_delta, key_base, value_base,
            key_block * KEYS + tl.arange(0, KEYS), key_stride, value_stride, n, carry, tile,
            score_scale, WIDTH, PADDED, ROWS, KEYS, True, PRECISION, UPCAST,
        )  # fmt: skip
    for place in range(changing, changing + tl.load(constant + batch * blocks + block)):
        gradient = _query_tile(
            gradient, queries, d_seen, row_sum, row_delta, key_base, value_base,
            tl.load(todo + place) * KEYS + tl.arange(0, KEYS), key_stride, value_stride, n, carry, local,
            score_scale, WIDTH, PADDED, ROWS, KEYS, False, PRECISION, UPCAST,
        )  # fmt: skip
    tl.store(delta + own + row, row_delta, mask=row < n)
    store_rows(d_query + own * WIDTH, row, WIDTH, n, gradient * scale, WIDTH, PADDED)


@triton.jit
def _key_tile(
    d_keys, d_values, keys, values, query_base, query_stride, d_seen_base, d_seen_stride, row, n, log_sum, delta,
    key_carry, local, score_scale, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CHANGING: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d_keys + dS^T Q and d_values + P^T dO of one tile, keys by queries.

    Queries and d_seen are loaded both ways round: transposing what is in registers takes so many that they spill.
    """
    queries = load_columns(query_base, row, query_stride, n, WIDTH, PADDED, UPCAST)
    d_seen = load_rows(d_seen_base, row, d_seen_stride, n, WIDTH, PADDED, UPCAST)
    row_sum = tl.load(log_sum + row, mask=row < n, other=NO_ROW)
    row_delta = tl.load(delta + row, mask=row < n, other=0.0)
    scores = tl.dot(keys, queries, input_precision=PRECISION) * score_scale + key_carry[:, None]
    if CHANGING:
        scores += load_bias(local, ROWS, KEYS, True)
    weights = tl.exp2(scores - row_sum[None, :])
    d_values = tl.dot(weights.to(d_seen.dtype), d_seen, d_values, input_precision=PRECISION)
    across = load_columns(d_seen_base, row, d_seen_stride, n, WIDTH, PADDED, UPCAST)
    d_scores = weights * (tl.dot(values, across, input_precision=PRECISION) - row_delta[None, :])
    down = load_rows(query_base, row, query_stride, n, WIDTH, PADDED, UPCAST)
    d_keys = tl.dot(d_scores.to(queries.dtype), down, d_keys, input_precision=PRECISION)
    return d_keys, d_values


@triton.jit(do_not_specialize=VARYING)
def key_gradient_kernel(
    query, key, value, d_output, log_sum, delta, d_key, d_value, home, carries, local, order, mixed, constant,
    query_batch_stride, query_head_stride, query_stride, key_batch_stride, key_head_stride, key_stride,
    value_batch_stride, value_head_stride, value_stride, d_output_batch_stride, d_output_head_stride, d_output_stride,
    heads, groups, n, first_block, row_blocks, blocks, key_blocks, score_scale, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds to d_key and d_value (batch, kv heads, n, WIDTH, float32) what the row blocks of this pass want.

    home (batch, keys): the key in each slot (triton_segments.py), whose gradients those of the slot are.

    Grid: kv heads x key blocks x batch. order (batch, key blocks, blocks): for each key block first the `mixed`, then
    the `constant` row blocks. Tiles are taken in PARTS of their rows: two accumulators leave registers for half a tile.
    """
    kv_head, key_block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    listed = batch * key_blocks + key_block
    changing = tl.load(mixed + listed)
    stop = changing + tl.load(constant + listed)
    if stop == 0:
        return
    todo = order + listed * blocks
    column = key_block * KEYS + tl.arange(0, KEYS)
    width = key_blocks * KEYS
    carry = carries + (batch * row_blocks + first_block) * width + column
    keys = load_rows(
        head_base(key, batch, key_batch_stride, kv_head, key_head_stride),
        column, key_stride, n, WIDTH, PADDED, UPCAST,
    )  # fmt: skip
    values = load_rows(
        head_base(value, batch, value_batch_stride, kv_head, value_head_stride),
        column, value_stride, n, WIDTH, PADDED, UPCAST,
    )  # fmt: skip
    d_keys, d_values = tl.zeros([KEYS, PADDED], tl.float32), tl.zeros([KEYS, PADDED], tl.float32)
    for head in range(kv_head * groups, (kv_head + 1) * groups):
        query_base = head_base(query, batch, query_batch_stride, head, query_head_stride)
        d_seen_base = head_base(d_output, batch, d_output_batch_stride, head, d_output_head_stride)
        own = (batch * heads + head) * n
        for item in range(changing * PARTS):
            block, part = tl.load(todo + item // PARTS), item % PARTS * (ROWS // PARTS)
            tile = tile_base(local, batch, blocks, block, key_blocks, key_block, ROWS, KEYS) + part * KEYS
            d_keys, d_values = _key_tile(
                d_keys, d_values, keys, values, query_base, query_stride, d_seen_base, d_output_stride,
                (first_block + block) * ROWS + part + tl.arange(0, ROWS // PARTS), n, log_sum + own, delta + own,
                tl.load(carry + block * width), tile,
                score_scale, WIDTH, PADDED, ROWS // PARTS, KEYS, True, PRECISION, UPCAST,
            )  # fmt: skip
        for item in range(changing * PARTS, stop * PARTS):
            block, part = tl.load(todo + item // PARTS), item % PARTS * (ROWS // PARTS)
            d_keys, d_values = _key_tile(
                d_keys, d_values, keys, values, query_base, query_stride, d_seen_base, d_output_stride,
                (first_block + block) * ROWS + part + tl.arange(0, ROWS // PARTS), n, log_sum + own, delta + own,
                tl.load(carry + block * width), local,
                score_scale, WIDTH, PADDED, ROWS // PARTS, KEYS, False, PRECISION, UPCAST,
            )  # fmt: skip
    own = (batch * tl.num_programs(0) + kv_head) * n * WIDTH
    place = tl.load(home + batch * width + column)
    add_rows(d_key + own, place, WIDTH, n, d_keys * scale, WIDTH, PADDED)
    add_rows(d_value + own, place, WIDTH, n, d_values, WIDTH, PADDED)


def parts(rows: int) -> int:
    """Parts of a tile in key_gradient_kernel: two, unless they were too small for tensor cores, which want 16 rows."""
    return 2 if rows >= 32 else 1


def query_launch(width: int, dtype: torch.dtype, generation: str) -> tuple[int, int]:
    """Warps and loads in flight of query_gradient_kernel; as triton_forward.launch."""
    if dtype == torch.float32:
        return (4, 1) if generation == "cdna" else (4, 3) if width <= 64 else (8, 2)
    return 4, 5 if width <= 64 and generation == "hopper" else 3


def key_launch(width: int, dtype: torch.dtype, generation: str) -> tuple[int, int]:
    """Warps and loads in flight of key_gradient_kernel: those without spills."""
    if generation == "cdna":
        return 4, 2
    if width > 64:
        return 8, 2
    return 4, 3 if generation == "ampere" and dtype != torch.float32 else 2


def _shipped(kernel, pointers: dict[str, str], variant: Variant) -> list[Shipped]:
    strides = (*STRIDES, *(f"d_output_{axis}stride" for axis in ("batch_", "head_", "")))
    numbers = dict.fromkeys(strides + NUMBERS, "i32") | {"score_scale": "fp32", "scale": "fp32"}
    constants, launch = attention_constants(variant.width, variant.dtype, variant.tile), query_launch
    if kernel is key_gradient_kernel:
        constants, launch = constants | {"PARTS": parts(variant.tile[0])}, key_launch
    found = []
    for family in FAMILIES:
        how = (*launch(variant.width, variant.dtype, family), (family,), variant.usual)
        found.append(Shipped(f"{kernel.__name__} {variant.name}", kernel, pointers | numbers, constants, *how))
    return found


def shipped() -> list[Shipped]:
    """Every shape of triton_shape.TRAINED."""
    found = []
    for variant in TRAINED:
        pointer, bias = f"*{DTYPES[variant.dtype]}", bias_signature(variant.dtype)
        inputs = dict.fromkeys(("query", "key", "value"), pointer)
        sums = dict.fromkeys(("log_sum", "delta"), "*fp32")
        pointers = {**inputs, "output": pointer, "d_output": pointer, **sums, "d_query": pointer, **bias}
        found += _shipped(query_gradient_kernel, pointers, variant)
        pointers = {**inputs, "d_output": pointer, **sums, "d_key": "*fp32", "d_value": "*fp32", "home": "*i32"} | bias
        found += _shipped(key_gradient_kernel, pointers, variant)
    return found
