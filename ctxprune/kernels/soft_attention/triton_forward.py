"""What do queries see? Softmax attention with log I added, over the tiles in which anything is left to see."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ctxprune.kernels.ahead_of_time import FAMILIES, Shipped
from ctxprune.kernels.soft_attention.triton_shape import DTYPES, TRAINED, attention_constants
from ctxprune.kernels.soft_attention.triton_tiles import (
    GONE,
    VARYING,
    head_base,
    load_bias,
    load_columns,
    load_rows,
    store_rows,
    tile_base,
)


@triton.jit
def _attend(
    queries,
    top,
    weight_sum,
    seen,
    key_base,
    value_base,
    key,
    key_stride,
    value_stride,
    n,
    carry,
    local,
    score_scale,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHANGING: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of the running softmax (arXiv 2205.14135); CHANGING: log I differs from query to query."""
    keys = load_columns(key_base, key, key_stride, n, WIDTH, PADDED, UPCAST)
    values = load_rows(value_base, key, value_stride, n, WIDTH, PADDED, UPCAST)
    scores = tl.dot(queries, keys, input_precision=PRECISION) * score_scale + tl.load(carry + key)[None, :]
    if CHANGING:
        scores += load_bias(local, ROWS, KEYS, False)
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None])
    fade = tl.exp2(top - new_top)
    weight_sum = weight_sum * fade + tl.sum(weights, axis=1)
    seen = tl.dot(weights.to(values.dtype), values, seen * fade[:, None], input_precision=PRECISION)
    return new_top, weight_sum, seen


@triton.jit(do_not_specialize=VARYING)
def attention_kernel(
    query,
    key,
    value,
    output,
    log_sum,
    carries,
    local,
    order,
    mixed,
    constant,
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
    n,
    first_block,
    row_blocks,
    blocks,
    key_blocks,
    score_scale,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One row block of one head. Grid: heads (fastest: they share the tiles of log I) x row blocks x batch.

    order (batch, blocks, key blocks): for each row block first the `mixed`, then the `constant` key blocks. Writes
    output (batch, heads, n, WIDTH) and log_sum (batch, heads, n), the log2 of the softmax's denominator.
    """
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    block = blocks - 1 - tl.program_id(1)  # the longest first
    row = (first_block + block) * ROWS + tl.arange(0, ROWS)
    kv_head = head // groups
    query_base = head_base(query, batch, query_batch_stride, head, query_head_stride)
    key_base = head_base(key, batch, key_batch_stride, kv_head, key_head_stride)
    value_base = head_base(value, batch, value_batch_stride, kv_head, value_head_stride)
    carry = carries + (batch * row_blocks + first_block + block) * (key_blocks * KEYS)
    queries = load_rows(query_base, row, query_stride, n, WIDTH, PADDED, UPCAST)
    top = tl.full([ROWS], GONE, tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    seen = tl.zeros([ROWS, PADDED], tl.float32)
    changing = tl.load(mixed + batch * blocks + block)
    todo = order + (batch * blocks + block) * key_blocks
    # Two loops without a branch: a branch inside would keep the loads from being fetched ahead.
    for place in range(changing):
        key_block = tl.load(todo + place)
        tile = tile_base(local, batch, blocks, block, key_blocks, key_block, ROWS, KEYS)
        keys = key_block * KEYS + tl.arange(0, KEYS)
        top, weight_sum, seen = _attend(
            queries, top, weight_sum, seen, key_base, value_base, keys, key_stride, value_stride, n, carry, tile,
            score_scale, WIDTH, PADDED, ROWS, KEYS, True, PRECISION, UPCAST,
        )  # fmt: skip
    for place in range(changing, changing + tl.load(constant + batch * blocks + block)):
        keys = tl.load(todo + place) * KEYS + tl.arange(0, KEYS)
        top, weight_sum, seen = _attend(
            queries, top, weight_sum, seen, key_base, value_base, keys, key_stride, value_stride, n, carry, local,
            score_scale, WIDTH, PADDED, ROWS, KEYS, False, PRECISION, UPCAST,
        )  # fmt: skip
    own = (batch * heads + head) * n
    store_rows(output + own * WIDTH, row, WIDTH, n, seen / weight_sum[:, None], WIDTH, PADDED)
    tl.store(log_sum + own + row, top + tl.log2(weight_sum), mask=row < n)


STRIDES = tuple(f"{name}_{axis}stride" for name in ("query", "key", "value") for axis in ("batch_", "head_", ""))
NUMBERS = ("heads", "groups", "n", "first_block", "row_blocks", "blocks", "key_blocks")


def launch(width: int, dtype: torch.dtype, generation: str) -> tuple[int, int]:
    """Warps and loads in flight of attention_kernel: no spills, and room for a second program beside.

    A key is loaded through its entry in a list, which takes two of the loads in flight: 5 fetch two tiles ahead.
    """
    if dtype == torch.float32:
        return (4, 1) if generation == "cdna" else (4, 3) if width <= 64 else (8, 2)
    return 4, 5 if width <= 64 and generation != "cdna" else 3


def bias_signature(dtype: torch.dtype) -> dict[str, str]:
    """Types of the arguments that say which tiles are visited and what log I is there."""
    local = "*fp32" if dtype == torch.float32 else "*fp16"
    return {"carries": "*fp32", "local": local, **dict.fromkeys(("order", "mixed", "constant"), "*i32")}


def shipped() -> list[Shipped]:
    """Every shape of triton_shape.TRAINED."""
    found = []
    for variant in TRAINED:
        width, dtype = variant.width, variant.dtype
        signature = {
            **dict.fromkeys(("query", "key", "value", "output"), f"*{DTYPES[dtype]}"),
            "log_sum": "*fp32",
            **bias_signature(dtype),
            **dict.fromkeys(STRIDES + NUMBERS, "i32"),
            "score_scale": "fp32",
        }
        constants, name = attention_constants(width, dtype, variant.tile), f"attention_kernel {variant.name}"
        for family in FAMILIES:
            how = (*launch(width, dtype, family), (family,), variant.usual)
            found.append(Shipped(name, attention_kernel, signature, constants, *how))
    return found
