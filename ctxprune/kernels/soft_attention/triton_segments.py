"""Which keys does a segment of queries see? Those alive at its start, packed in front of the segment's own.

A segment gives every key a slot: the older keys take the slots before its first row, the living ones first, and from
that row on slot and key are the same. So every older key lies before every row of the segment, and what the kernels
know of a key's place (causality, the diagonal, addresses) holds for its slot. Nothing waits for the host: there is a
slot for every key, and tiles whose keys are all gone are neither copied nor visited.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctxprune.kernels.ahead_of_time import Shipped
from ctxprune.kernels.soft_attention.triton_shape import DTYPES, SHAPES, Shape, padded, strides_of
from ctxprune.kernels.soft_attention.triton_tiles import GONE, SMALLEST, VARYING, head_base, load_rows, store_rows

SEGMENT = 512
"""Rows per segment at least: what it copies is then read by 8 blocks of queries of every head."""

PROGRAMS = 264
"""Blocks of queries, over heads and batch, that a segment should have: two for each of 132 multiprocessors."""

PACK_WARPS = 4


class Seen(NamedTuple):
    """What a segment's queries read of keys, slot by slot."""

    home: Tensor  # (batch, padded) int32: the key in each slot
    key: Tensor
    value: Tensor
    interaction_key: Tensor
    guard: Tensor
    end: Tensor


def segment_rows(n: int, heads: int, rows: int) -> int:
    """Rows per segment: as few as fill a GPU with `heads` (of all sequences) times blocks of `rows`; all, where there
    would be no more than two segments and little to leave out."""
    least = max(SEGMENT, triton.cdiv(PROGRAMS, heads) * rows)
    return n if n <= 2 * least else least


def segments(shape: Shape, rows: int) -> list[tuple[int, int]]:
    """(first row block, row blocks) of each segment of `rows` rows, rounded up to whole tiles."""
    blocks = _blocks(shape, rows)
    return [(first, min(blocks, shape.row_blocks - first)) for first in range(0, shape.row_blocks, blocks)]


def homes_shape(shape: Shape, rows: int) -> tuple[int, int, int]:
    """Of the keys in the slots of all segments, which the backward pass needs again: (segments, batch, padded)."""
    # Not len(segments(...)): where torch compiles for any n, counting them would fix it.
    return triton.cdiv(shape.row_blocks, _blocks(shape, rows)), shape.batch, shape.padded


def _blocks(shape: Shape, rows: int) -> int:
    """Row blocks per segment."""
    tile = max(shape.rows, shape.keys)
    return triton.cdiv(rows, tile) * tile // shape.rows


def slots(carry: Tensor, end: Tensor, start: int) -> Tensor:
    """home (batch, padded) int32 of the segment that begins with row `start`: older living keys, older ones that are
    gone, then the others, each in order. carry: log2 I before that row; set to GONE where another document begins."""
    ended = end <= start
    carry[:, : end.shape[1]].masked_fill_(ended, GONE.value)
    rank = (carry <= SMALLEST.value).to(torch.uint8)
    rank[:, start:] = 2
    return torch.argsort(rank, dim=1, stable=True).to(torch.int32)


def pack(shape: Shape, seen: Seen, home: Tensor, carry: Tensor, start: int, stop: int) -> Seen:
    """The keys of `seen` (in their own order) by slot, as far as `stop`. carry: theirs before row `start`, by slot."""
    if start == 0:
        return seen._replace(home=home)
    slot_end = min(stop, shape.n)
    copies = []
    for tensor in (seen.key, seen.value, seen.interaction_key[:, None]):
        heads, width = tensor.shape[1], tensor.shape[3]
        copy = torch.empty(shape.batch, heads, slot_end, width, dtype=tensor.dtype, device=tensor.device)
        pack_kernel[(triton.cdiv(slot_end, shape.keys), heads, shape.batch)](
            tensor, copy, home, carry, *strides_of(tensor), carry.stride(0), home.stride(0), slot_end, shape.n,
            WIDTH=width, PADDED=padded(width), KEYS=shape.keys, num_warps=PACK_WARPS,
        )  # fmt: skip
        copies.append(copy)
    key, value, interaction_key = copies
    own = home[:, : shape.n].long()
    return Seen(home, key, value, interaction_key[:, 0], seen.guard.gather(1, own), seen.end.gather(1, own))


@triton.jit(do_not_specialize=(*VARYING, "slot_end"))
def pack_kernel(
    source, packed, home, carry, batch_stride, head_stride, stride, carry_stride, home_stride, slot_end, n,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Copy rows of source (batch, heads, n, WIDTH) to their slots in packed (batch, heads, slot_end, WIDTH), but not
    where a whole tile is gone. Grid: tiles of slots x heads x batch."""
    slot = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if tl.max(tl.load(carry + batch * carry_stride + slot), axis=0) <= SMALLEST:
        return
    key = tl.load(home + batch * home_stride + slot)
    tile = load_rows(head_base(source, batch, batch_stride, head, head_stride), key, stride, n, WIDTH, PADDED, False)
    own = packed + (batch * tl.num_programs(1) + head) * slot_end * WIDTH
    store_rows(own, slot, WIDTH, slot_end, tile, WIDTH, PADDED)


def shipped() -> list[Shipped]:
    """Every shape of triton_shape.SHAPES."""
    strides = ("batch_stride", "head_stride", "stride", "carry_stride", "home_stride")
    return [
        Shipped(
            f"pack_kernel {variant.name}",
            pack_kernel,
            {
                **dict.fromkeys(("source", "packed"), f"*{DTYPES[variant.dtype]}"),
                **{"home": "*i32", "carry": "*fp32"},
                **dict.fromkeys((*strides, "slot_end", "n"), "i32"),
            },
            {"WIDTH": variant.width, "PADDED": padded(variant.width), "KEYS": 64},
            PACK_WARPS,
            3,
            usual=variant.usual,
        )
        for variant in SHAPES
    ]
