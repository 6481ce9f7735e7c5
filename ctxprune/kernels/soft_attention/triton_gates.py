"""What do a layer's gates come to? log I per tile, once for all heads, and what each key carries from block to block.

Tiles are independent: each holds log I since its own first query, and a key's history before that is one number, the
carry, so that a running sum over row blocks is all that is sequential.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ctxprune.kernels.ahead_of_time import Shipped
from ctxprune.kernels.sigmoid.triton_ops import family, log2_gate
from ctxprune.kernels.soft_attention.triton_shape import DTYPES, GATES, TILE, default_tile, gate_constants
from ctxprune.kernels.soft_attention.triton_tiles import (
    CONSTANT,
    DEAD,
    GONE,
    HALF_GONE,
    MIXED,
    SMALLEST,
    VARYING,
    at_least,
    load_columns,
    load_rows,
    tile_base,
)

GATE_WARPS = 8
"""With 4 the Newton steps of a 64 x 64 tile spill."""

CARRY_WARPS = 2
"""64 keys side by side: more would idle."""


@triton.jit(do_not_specialize=VARYING)
def gate_kernel(
    interaction_query,
    interaction_key,
    beta,
    guard,
    end,
    carry,
    tile_class,
    local,
    slope,
    total,
    share,
    query_batch_stride,
    query_stride,
    key_batch_stride,
    key_stride,
    n,
    first_block,
    row_blocks,
    blocks,
    key_blocks,
    e,
    gate_scale,
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    REPLAY: tl.constexpr,
    FLAT: tl.constexpr,
    STEPS: tl.constexpr,
    PTX: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of gates. Grid: row blocks of this pass x key blocks x batch; `blocks` of them, from `first_block`.

    Forward: log2 I since the block's first query to `local`, and per key its last value to `total`, the sum of I over
    the queries after the key to `share`; `carry` (batch, keys) says which keys are gone before the pass.
    REPLAY: only tiles whose class is MIXED, to `local` and d ln g/dx to `slope`.
    e: alpha - 1, read from memory, so that a new value makes no new graph where torch compiles the model.
    """
    block, key_block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (first_block + block) * ROWS + tl.arange(0, ROWS)
    key = key_block * KEYS + tl.arange(0, KEYS)
    if key_block * KEYS >= (first_block + block + 1) * ROWS:
        return
    # All tiles of the pass lie behind one another in `total`, `share` and `local`.
    column = (batch * blocks + block) * (key_blocks * KEYS) + key
    if REPLAY:
        if tl.load(tile_class + (batch * row_blocks + first_block + block) * key_blocks + key_block) != MIXED:
            return
    else:
        if tl.max(tl.load(carry + batch * (key_blocks * KEYS) + key), axis=0) <= SMALLEST:
            return
    here = key < n
    first = tl.load(guard + batch * n + key, mask=here, other=0)[:, None]
    last = tl.load(end + batch * n + key, mask=here, other=0)[:, None]
    # Keys are the tile's rows, so that the running sum over queries stays inside a warp.
    keys = load_rows(interaction_key + batch * key_batch_stride, key, key_stride, n, RANK, PADDED_RANK, UPCAST)
    queries = load_columns(
        interaction_query + batch * query_batch_stride, row, query_stride, n, RANK, PADDED_RANK, UPCAST
    )
    x = tl.dot(keys, queries, input_precision=PRECISION) * gate_scale + tl.load(beta).to(tl.float32)
    log_gate, derivative = log2_gate(x, tl.load(e), FLAT, STEPS, PTX)
    after = row[None, :] > key[:, None]
    active = after & (row[None, :] >= first) & (row[None, :] < last)
    log_gate = tl.where(active, log_gate, tl.where(after & (row[None, :] >= last), GONE, 0.0))
    inside = tl.cumsum(log_gate, axis=1)
    place = tl.arange(0, ROWS)[None, :] * KEYS + tl.arange(0, KEYS)[:, None]
    seen = (row[None, :] >= key[:, None]) & (row < n)[None, :] & here[:, None]
    smallest = GONE if local.dtype.element_ty == tl.float32 else HALF_GONE
    kept = at_least(tl.where(seen, inside, smallest), smallest)
    base = tile_base(local, batch, blocks, block, key_blocks, key_block, ROWS, KEYS)
    tl.store(base + place, kept.to(local.dtype.element_ty))
    if REPLAY:
        base = tile_base(slope, batch, blocks, block, key_blocks, key_block, ROWS, KEYS)
        tl.store(base + place, tl.where(active & seen, derivative, 0.0))
    else:
        tl.store(total + column, at_least(tl.sum(log_gate, axis=1), GONE))
        tl.store(share + column, tl.sum(tl.where(after & seen, tl.exp2(at_least(inside, GONE)), 0.0), axis=1))


@triton.jit(do_not_specialize=VARYING)
def carry_kernel(
    total,
    share,
    carry,
    carries,
    tile_class,
    alive,
    first_block,
    row_blocks,
    blocks,
    key_blocks,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """log2 I of each key before each row block, to `carries`, and each tile's class. Grid: key blocks x batch.

    `carry` (batch, keys) is what the keys carry into this pass, and afterwards out of it; the sum of I over the pass is
    added to `alive` (batch, key blocks).
    """
    key_block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key = key_block * KEYS + tl.arange(0, KEYS)
    width = key_blocks * KEYS
    now = tl.load(carry + batch * width + key)
    sum_alive = tl.load(alive + batch * key_blocks + key_block)
    for block in range(blocks):
        place = batch * row_blocks + first_block + block
        tl.store(carries + place * width + key, now)
        inside = (batch * blocks + block) * width + key
        change = tl.load(total + inside)
        weight = tl.where(now > SMALLEST, tl.exp2(tl.maximum(now, SMALLEST)), 0.0)
        seen = weight * tl.load(share + inside)
        sum_alive += tl.sum(seen, axis=0)
        changes = tl.max(tl.where((weight > 0) & (change != 0), 1, 0), axis=0)
        anything = tl.max(tl.where(seen == seen, seen, 1.0), axis=0)  # NaN is to be seen, not skipped
        kind = tl.where(anything > 0, tl.where(changes > 0, MIXED, CONSTANT), DEAD)
        row = (first_block + block) * ROWS
        kind = tl.where(row < (key_block + 1) * KEYS, MIXED, kind)
        tl.store(tile_class + place * key_blocks + key_block, tl.where(row + ROWS <= key_block * KEYS, DEAD, kind))
        now = at_least(now + change, GONE)
    tl.store(carry + batch * width + key, now)
    tl.store(alive + batch * key_blocks + key_block, sum_alive)


def _signature(dtype: torch.dtype) -> dict[str, str]:
    return {
        **dict.fromkeys(("interaction_query", "interaction_key"), f"*{DTYPES[dtype]}"),
        "beta": "*fp32",
        **dict.fromkeys(("guard", "end"), "*i32"),
        "carry": "*fp32",
        "tile_class": "*i32",
        "local": "*fp32" if dtype == torch.float32 else "*fp16",
        **dict.fromkeys(("slope", "total", "share"), "*fp32"),
        **dict.fromkeys(("query_batch_stride", "query_stride", "key_batch_stride", "key_stride"), "i32"),
        **dict.fromkeys(("n", "first_block", "row_blocks", "blocks", "key_blocks"), "i32"),
        "e": "*fp32",
        "gate_scale": "fp32",
    }


def shipped() -> list[Shipped]:
    """Every rank and type of triton_shape.GATES, the logistic and every family of alpha."""
    gates = [
        Shipped(
            f"gate_kernel {'replay' if replay else 'forward'} alpha={alpha} rank={rank} {DTYPES[dtype]}",
            gate_kernel,
            _signature(dtype),
            gate_constants(rank, dtype, default_tile(dtype)) | family(alpha) | {"PTX": True, "REPLAY": replay},
            GATE_WARPS,
            2,
            usual=rank == 64,
        )
        for alpha in (1.0, 1.5, 3.0, 8.0)
        for replay in (False, True)
        for rank, dtype in GATES
    ]
    pointers = dict.fromkeys(("total", "share", "carry", "carries"), "*fp32") | {"tile_class": "*i32", "alive": "*fp32"}
    numbers = dict.fromkeys(("first_block", "row_blocks", "blocks", "key_blocks"), "i32")
    tile = dict(zip(("ROWS", "KEYS"), TILE, strict=True))
    return [*gates, Shipped("carry_kernel", carry_kernel, pointers | numbers, tile, CARRY_WARPS, 3)]
