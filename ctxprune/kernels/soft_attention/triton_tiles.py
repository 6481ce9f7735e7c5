"""How do the training kernels address memory? Tiles of queries x keys, and rows of a matrix padded to a power of two.

Where n is cut: row block i holds queries i * ROWS and following, key block j keys j * KEYS and following. A tile of
those is MIXED when a gate in it does anything (or the diagonal crosses it), CONSTANT when every key has one log I
throughout, DEAD when no query of the block sees any key of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

DEAD = tl.constexpr(0)
CONSTANT = tl.constexpr(1)
MIXED = tl.constexpr(2)

GONE = tl.constexpr(-1e30)
"""log2 of 0: finite, so that nothing is ever inf - inf."""

SMALLEST = tl.constexpr(-126.0)
"""log2 I from which a key counts as gone: the smallest normal float32."""

HALF_GONE = tl.constexpr(-60000.0)
"""GONE where log I is kept in float16: exp2 of it is 0 beside any score that a softmax can bear."""

VARYING = ("first_block", "row_blocks", "blocks", "key_blocks")
"""Arguments that change from pass to pass: Triton would compile kernels anew where they are 1 or multiples of 16."""


@triton.jit
def at_least(x, smallest):
    """The larger of the two, and NaN where x is: tl.maximum alone would turn a gate that is NaN into one that drops."""
    return tl.maximum(x, smallest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_rows(base, row, stride, n, WIDTH: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr):
    """(rows, PADDED) of a matrix with `n` rows of WIDTH numbers each; zeros beyond. UPCAST: to float32."""
    column = tl.arange(0, PADDED)
    here = (row < n)[:, None] & (column < WIDTH)[None, :]
    tile = tl.load(base + row[:, None] * stride + column[None, :], mask=here, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def load_columns(base, row, stride, n, WIDTH: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr):
    """The same as load_rows, transposed: (PADDED, rows)."""
    column = tl.arange(0, PADDED)
    here = (row < n)[None, :] & (column < WIDTH)[:, None]
    tile = tl.load(base + row[None, :] * stride + column[:, None], mask=here, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_rows(base, row, stride, n, tile, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Write what load_rows reads."""
    column = tl.arange(0, PADDED)
    here = (row < n)[:, None] & (column < WIDTH)[None, :]
    tl.store(base + row[:, None] * stride + column[None, :], tile.to(base.dtype.element_ty), mask=here)


@triton.jit
def add_rows(base, row, stride, n, tile, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Add to what load_rows reads; one program owns the rows, so nothing atomic is needed."""
    store_rows(base, row, stride, n, tile + load_rows(base, row, stride, n, WIDTH, PADDED, False), WIDTH, PADDED)


@triton.jit
def head_base(base, batch, batch_stride, head, head_stride):
    """Where the (rows, width) matrix of one head begins; batch is int64."""
    return base + batch * batch_stride + tl.cast(head, tl.int64) * head_stride


@triton.jit
def tile_base(base, batch, blocks, block, key_blocks, key_block, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Where a tile begins in a workspace (batch, row blocks, key blocks, ROWS, KEYS); batch is int64."""
    return base + ((batch * blocks + block) * key_blocks + key_block) * (ROWS * KEYS)


@triton.jit
def load_bias(local, ROWS: tl.constexpr, KEYS: tl.constexpr, ACROSS: tl.constexpr):
    """log2 I since the block's first query, (ROWS, KEYS) or with ACROSS (KEYS, ROWS); GONE or HALF_GONE where a key is
    not seen."""
    row, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    if ACROSS:
        bias = tl.load(local + row[None, :] * KEYS + key[:, None])
    else:
        bias = tl.load(local + row[:, None] * KEYS + key[None, :])
    return bias.to(tl.float32)
