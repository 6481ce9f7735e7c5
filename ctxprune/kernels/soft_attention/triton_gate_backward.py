"""What does the loss want of the gates? dLoss/dlog I per tile, summed backwards over queries, times d ln g/dx.

The sum is formed backwards, inside a tile and from block to block, never as a total less a running sum: near g = 0 what
that leaves of rounding is multiplied by 1/g (README.md beside this file).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ctxprune.kernels.ahead_of_time import FAMILIES, Shipped
from ctxprune.kernels.soft_attention.triton_backward import NO_ROW
from ctxprune.kernels.soft_attention.triton_forward import NUMBERS, STRIDES, bias_signature
from ctxprune.kernels.soft_attention.triton_shape import (
    DTYPES,
    GATES,
    TRAINED,
    attention_constants,
    default_tile,
    gate_constants,
    padded,
)
from ctxprune.kernels.soft_attention.triton_tiles import (
    DEAD,
    MIXED,
    SMALLEST,
    VARYING,
    add_rows,
    head_base,
    load_bias,
    load_columns,
    load_rows,
    store_rows,
    tile_base,
)


@triton.jit(do_not_specialize=VARYING)
def wanted_kernel(
    query, key, value, d_output, log_sum, delta, d_alive, carries, tile_class, local, wanted, column_sum,
    query_batch_stride, query_head_stride, query_stride, key_batch_stride, key_head_stride, key_stride,
    value_batch_stride, value_head_stride, value_stride, d_output_batch_stride, d_output_head_stride, d_output_stride,
    heads, groups, n, first_block, row_blocks, blocks, key_blocks, score_scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dLoss/dlog I of one tile, summed over all heads in registers. Grid: row blocks x key blocks x batch.

    Writes its sum over queries to `column_sum` (batch, blocks, keys), and for MIXED tiles to `wanted` the sum from
    each query to the block's last one. Heads are read in pieces of PIECE numbers, a divisor of PADDED.
    """
    block, key_block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = batch * row_blocks + first_block + block
    kind = tl.load(tile_class + place * key_blocks + key_block)
    if kind == DEAD:
        return
    row = (first_block + block) * ROWS + tl.arange(0, ROWS)
    column = key_block * KEYS + tl.arange(0, KEYS)
    width = key_blocks * KEYS
    bias = tl.zeros([KEYS, ROWS], tl.float32) + tl.load(carries + place * width + column)[:, None]
    if kind == MIXED:
        bias += load_bias(tile_base(local, batch, blocks, block, key_blocks, key_block, ROWS, KEYS), ROWS, KEYS, True)
    counted = (row[None, :] > column[:, None]) & (row < n)[None, :]
    wants = tl.where(counted, tl.exp2(tl.maximum(bias, 2 * SMALLEST)), 0.0) * tl.load(d_alive + batch).to(tl.float32)
    for head in range(heads):
        own, kv_head = (batch * heads + head) * n, head // groups
        query_base = head_base(query, batch, query_batch_stride, head, query_head_stride)
        key_base = head_base(key, batch, key_batch_stride, kv_head, key_head_stride)
        value_base = head_base(value, batch, value_batch_stride, kv_head, value_head_stride)
        d_seen_base = head_base(d_output, batch, d_output_batch_stride, head, d_output_head_stride)
        scores, d_weights = tl.zeros([KEYS, ROWS], tl.float32), tl.zeros([KEYS, ROWS], tl.float32)
        for at in tl.static_range(0, PADDED, PIECE):
            keys = load_rows(key_base + at, column, key_stride, n, WIDTH - at, PIECE, UPCAST)
            values = load_rows(value_base + at, column, value_stride, n, WIDTH - at, PIECE, UPCAST)
            queries = load_columns(query_base + at, row, query_stride, n, WIDTH - at, PIECE, UPCAST)
            d_seen = load_columns(d_seen_base + at, row, d_output_stride, n, WIDTH - at, PIECE, UPCAST)
            scores = tl.dot(keys, queries, scores, input_precision=PRECISION)
            d_weights = tl.dot(values, d_seen, d_weights, input_precision=PRECISION)
        row_sum = tl.load(log_sum + own + row, mask=row < n, other=NO_ROW)
        row_delta = tl.load(delta + own + row, mask=row < n, other=0.0)
        weights = tl.exp2(scores * score_scale + bias - row_sum[None, :])
        wants += weights * (d_weights - row_delta[None, :])
    tl.store(column_sum + (batch * blocks + block) * width + column, tl.sum(wants, axis=1))
    if kind == MIXED:
        base = tile_base(wanted, batch, blocks, block, key_blocks, key_block, ROWS, KEYS)
        inside = tl.arange(0, ROWS)[None, :] * KEYS + tl.arange(0, KEYS)[:, None]
        tl.store(base + inside, tl.cumsum(wants, axis=1, reverse=True))


@triton.jit(do_not_specialize=VARYING)
def suffix_kernel(column_sum, suffix, later, blocks, key_blocks, KEYS: tl.constexpr):
    """Sums over all later row blocks, to `later` (batch, blocks, keys). Grid: key blocks x batch.

    `suffix` (batch, keys) is the sum over the passes after this one, and afterwards includes it.
    """
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    batch, width = tl.program_id(1).to(tl.int64), key_blocks * KEYS
    now = tl.load(suffix + batch * width + key)
    for back in range(blocks):
        place = (batch * blocks + blocks - 1 - back) * width + key
        tl.store(later + place, now)
        now += tl.load(column_sum + place)
    tl.store(suffix + batch * width + key, now)


@triton.jit(do_not_specialize=VARYING)
def gate_query_gradient_kernel(
    interaction_key, wanted, slope, later, d_interaction_query, d_beta, order, mixed,
    key_batch_stride, key_stride, n, first_block, row_blocks, blocks, key_blocks, gate_scale,
    RANK: tl.constexpr, PADDED_RANK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d_interaction_query (batch, n, RANK) and a share of d_beta (batch, row blocks). Grid: row blocks x batch."""
    block, batch = blocks - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, inside = (first_block + block) * ROWS + tl.arange(0, ROWS), tl.arange(0, KEYS)
    tile = tl.arange(0, ROWS)[:, None] * KEYS + inside[None, :]
    gradient = tl.zeros([ROWS, PADDED_RANK], tl.float32)
    shares = tl.zeros([ROWS], tl.float32)
    todo = order + (batch * blocks + block) * key_blocks
    for place in range(tl.load(mixed + batch * blocks + block)):
        key_block = tl.load(todo + place)
        column = key_block * KEYS + inside
        base = tile_base(0, batch, blocks, block, key_blocks, key_block, ROWS, KEYS) + tile
        suffix = tl.load(later + (batch * blocks + block) * (key_blocks * KEYS) + column)
        d_x = tl.load(slope + base) * (tl.load(wanted + base) + suffix[None, :])
        keys = load_rows(interaction_key + batch * key_batch_stride, column, key_stride, n, RANK, PADDED_RANK, UPCAST)
        # float32 operands: d_x reaches 1e7 next to a gate of 0, beyond float16.
        gradient = tl.dot(d_x, keys.to(tl.float32), gradient, input_precision=PRECISION)
        shares += tl.sum(d_x, axis=1)
    own = d_interaction_query + batch * n * RANK
    store_rows(own, row, RANK, n, gradient * gate_scale, RANK, PADDED_RANK)
    tl.store(d_beta + batch * row_blocks + first_block + block, tl.sum(shares, axis=0))


@triton.jit(do_not_specialize=VARYING)
def gate_key_gradient_kernel(
    interaction_query, wanted, slope, later, d_interaction_key, home, order, mixed,
    query_batch_stride, query_stride, n, first_block, blocks, key_blocks, gate_scale,
    RANK: tl.constexpr, PADDED_RANK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds to d_interaction_key (batch, n, RANK, float32) what this pass wants. Grid: key blocks x batch.

    home as in key_gradient_kernel."""
    key_block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column, inside = key_block * KEYS + tl.arange(0, KEYS), tl.arange(0, ROWS)
    tile = inside[None, :] * KEYS + tl.arange(0, KEYS)[:, None]
    gradient = tl.zeros([KEYS, PADDED_RANK], tl.float32)
    todo = order + (batch * key_blocks + key_block) * blocks
    for place in range(tl.load(mixed + batch * key_blocks + key_block)):
        block = tl.load(todo + place)
        row = (first_block + block) * ROWS + inside
        base = tile_base(0, batch, blocks, block, key_blocks, key_block, ROWS, KEYS) + tile
        suffix = tl.load(later + (batch * blocks + block) * (key_blocks * KEYS) + column)
        d_x = tl.load(slope + base) * (tl.load(wanted + base) + suffix[:, None])
        queries = load_rows(
            interaction_query + batch * query_batch_stride, row, query_stride, n, RANK, PADDED_RANK, UPCAST
        )
        gradient = tl.dot(d_x, queries.to(tl.float32), gradient, input_precision=PRECISION)
    own = tl.load(home + batch * (key_blocks * KEYS) + column)
    add_rows(d_interaction_key + batch * n * RANK, own, RANK, n, gradient * gate_scale, RANK, PADDED_RANK)


GATE_LAUNCH = (4, 2)
"""Warps and tiles in flight."""


def piece(width: int, dtype: torch.dtype) -> int:
    """Numbers of a head that wanted_kernel multiplies at once: all, but in float32 as few as tensor cores take, since
    what is held of more would spill."""
    return 16 if dtype == torch.float32 else padded(width)


def wanted_launch(width: int, dtype: torch.dtype, generation: str) -> tuple[int, int]:
    """Warps and heads in flight of wanted_kernel: no spills; a third head where it costs no second program."""
    if generation == "cdna" or dtype == torch.float32:
        return 4, 2
    return 8, 3 if (width > 64) == (generation == "hopper") else 2


SUFFIX_WARPS = 2
"""64 keys side by side: more would idle."""


def shipped() -> list[Shipped]:
    """Every shape of triton_shape.TRAINED; interactions of every rank in bfloat16 and float32."""
    found = []
    for variant in TRAINED:
        width, dtype = variant.width, variant.dtype
        bias = bias_signature(dtype)
        signature = {
            **dict.fromkeys(("query", "key", "value", "d_output"), f"*{DTYPES[dtype]}"),
            **dict.fromkeys(("log_sum", "delta", "d_alive", "carries"), "*fp32"),
            **{"tile_class": "*i32", "local": bias["local"], "wanted": "*fp32", "column_sum": "*fp32"},
            **dict.fromkeys(STRIDES + tuple(f"d_output_{axis}stride" for axis in ("batch_", "head_", "")), "i32"),
            **dict.fromkeys(NUMBERS, "i32"),
            "score_scale": "fp32",
        }
        shape = attention_constants(width, dtype, variant.tile) | {"PIECE": piece(width, dtype)}
        name = f"wanted_kernel {variant.name}"
        for family in FAMILIES:
            how = (*wanted_launch(width, dtype, family), (family,), variant.usual)
            found.append(Shipped(name, wanted_kernel, signature, shape, *how))
    for rank, dtype in GATES:
        found += _shipped_gates(rank, dtype)
    pointers = dict.fromkeys(("column_sum", "suffix", "later"), "*fp32") | {"blocks": "i32", "key_blocks": "i32"}
    return [*found, Shipped("suffix_kernel", suffix_kernel, pointers, {"KEYS": 64}, SUFFIX_WARPS, 3)]


def _shipped_gates(rank: int, dtype: torch.dtype) -> list[Shipped]:
    numbers = dict.fromkeys(("n", "first_block", "row_blocks", "blocks", "key_blocks"), "i32") | {"gate_scale": "fp32"}
    found = []
    for kernel, read, written in (
        (gate_query_gradient_kernel, "key", {"d_interaction_query": f"*{DTYPES[dtype]}", "d_beta": "*fp32"}),
        (gate_key_gradient_kernel, "query", {"d_interaction_key": "*fp32", "home": "*i32"}),
    ):
        signature = {
            f"interaction_{read}": f"*{DTYPES[dtype]}",
            **dict.fromkeys(("wanted", "slope", "later"), "*fp32"),
            **written,
            **dict.fromkeys(("order", "mixed"), "*i32"),
            **dict.fromkeys((f"{read}_batch_stride", f"{read}_stride"), "i32"),
            **{name: kind for name, kind in numbers.items() if name in kernel.arg_names},
        }
        constants, name = gate_constants(rank, dtype, default_tile(dtype)), f"{kernel.__name__} rank={rank}"
        how = (*GATE_LAUNCH, FAMILIES, rank == 64)
        found.append(Shipped(f"{name} {DTYPES[dtype]}", kernel, signature, constants, *how))
    return found
