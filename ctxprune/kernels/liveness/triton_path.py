"""When is each key dropped, on a GPU? A program per block of keys streams the queries until none of its keys lives."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ctxprune.kernels.ahead_of_time import Shipped
from ctxprune.kernels.checks import Refused
from ctxprune.kernels.sigmoid.triton_path import check_device, interpreted, on_device, precision
from ctxprune.kernels.soft_attention.triton_shape import DTYPES, GATES, check_addresses, check_rank
from ctxprune.kernels.soft_attention.triton_tiles import load_columns, load_rows

TILE = (64, 64)
"""Queries and keys per tile."""

BLOCKS_PER_LOOK = 4
"""Query blocks between two looks at whether a key of the block still lives. The inner loop is counted, so that its
loads are fetched ahead; a plain `while` has none."""

SPLIT_ROWS = 2048
"""Rows per program at least, where there are too few key blocks to fill a GPU."""

PROGRAMS = 264
"""Programs that fill the GPUs we know (132 multiprocessors, two each)."""

WARPS, STAGES = 4, 3


@triton.jit
def drop_time_kernel(
    interaction_query,
    interaction_key,
    beta,
    guard,
    drop_time,
    query_batch_stride,
    query_stride,
    key_batch_stride,
    key_stride,
    n,
    split_rows,
    gate_scale,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    LOOK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid: key blocks x splits of the rows x batch; a split looks at `split_rows` rows, a multiple of ROWS.

    drop_time (batch, n) holds `end`, at most n, when the kernel starts and is lowered to the first dropping row.
    """
    split, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    here = key < n
    first = tl.load(guard + batch * n + key, mask=here, other=2147483647)
    time = tl.load(drop_time + batch * n + key, mask=here, other=0)
    offset = tl.load(beta).to(tl.float32)
    keys = load_columns(interaction_key + batch * key_batch_stride, key, key_stride, n, RANK, PADDED, UPCAST)
    queries = interaction_query + batch * query_batch_stride
    # Rows before every guard drop nothing, rows after every death change nothing.
    start = tl.maximum(tl.min(first, axis=0) // ROWS * ROWS, split * split_rows)
    stop = tl.minimum(tl.max(time, axis=0), (split + 1) * split_rows)
    while start < stop:
        for block in range(LOOK):
            row = start + block * ROWS + tl.arange(0, ROWS)
            rows = load_rows(queries, row, query_stride, n, RANK, PADDED, UPCAST)
            x = tl.dot(rows, keys, input_precision=PRECISION) * gate_scale + offset
            dropping = (x <= 0) & (row[:, None] >= first[None, :])
            time = tl.minimum(time, tl.min(tl.where(dropping, row[:, None], 2147483647), axis=0))
        start += LOOK * ROWS
        stop = tl.minimum(tl.max(time, axis=0), stop)
    tl.atomic_min(drop_time + batch * n + key, time, mask=here, sem="relaxed")


def drop_times(
    interaction_query: Tensor,
    interaction_key: Tensor,
    beta: Tensor,
    guard: Tensor,
    end: Tensor,
    *,
    tile: tuple[int, int] = TILE,
    split_rows: int | None = None,
) -> Tensor:
    """Arguments and result as kernels.drop_times; tile: queries and keys per tile, powers of two from 16 on;
    split_rows: rows per program, a multiple of the tile's queries (by default as many as fill a GPU).

    Raises ValueError for float64, float32 of rank above 64, and for a device that has no Triton.
    """
    check_device(interaction_query)
    dtype = torch.promote_types(interaction_query.dtype, interaction_key.dtype)
    if dtype == torch.float64:
        raise Refused("float64 input: Triton computes in float32; take impl='torch'")
    query, key = (
        tensor.detach().to(dtype).contiguous() if tensor.stride(-1) != 1 else tensor.detach().to(dtype)
        for tensor in (interaction_query, interaction_key)
    )
    check_rank(query)
    check_addresses(query, key)
    batch, n, rank = query.shape
    rows, keys = tile
    key_blocks = triton.cdiv(n, keys)
    # Guards and ends may lie beyond any row (protected for ever, survives the batch): n says the same in 32 bits.
    bounded = end.clamp(max=n)
    found = bounded.to(torch.int32, copy=True, memory_format=torch.contiguous_format)  # the kernel lowers it in place
    guard = guard.clamp(max=n).to(torch.int32).contiguous()
    split_rows = _split_rows(n, rows, key_blocks * batch) if split_rows is None else split_rows
    with on_device(query):
        drop_time_kernel[(key_blocks, triton.cdiv(n, split_rows), batch)](
            query, key, beta.detach(), guard, found, *query.stride()[:2], *key.stride()[:2], n, split_rows,
            1.0 / math.sqrt(rank), **_constants(rank, rows, keys, dtype), num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return torch.where(found < bounded, found.to(end.dtype), end)


def _split_rows(n: int, rows: int, programs: int) -> int:
    """Rows per program: all, unless there are too few programs."""
    splits = max(1, min(PROGRAMS // programs, n // SPLIT_ROWS))
    return triton.cdiv(triton.cdiv(n, splits), rows) * rows


def _constants(rank: int, rows: int, keys: int, dtype: torch.dtype) -> dict[str, object]:
    return {
        "RANK": rank,
        "PADDED": max(16, triton.next_power_of_2(rank)),
        "ROWS": rows,
        "KEYS": keys,
        "LOOK": BLOCKS_PER_LOOK,
        "PRECISION": precision(dtype),
        "UPCAST": interpreted() and dtype == torch.bfloat16,
    }


def shipped() -> list[Shipped]:
    """Every rank, from bfloat16 and float32 gates."""
    pointers = ("interaction_query", "interaction_key", "beta")
    numbers = ("query_batch_stride", "query_stride", "key_batch_stride", "key_stride", "n", "split_rows")
    return [
        Shipped(
            f"drop_time_kernel rank={rank} {DTYPES[dtype]}",
            drop_time_kernel,
            {
                **dict.fromkeys(pointers, f"*{DTYPES[dtype]}"),
                **dict.fromkeys(("guard", "drop_time"), "*i32"),
                **dict.fromkeys(numbers, "i32"),
                "gate_scale": "fp32",
            },
            {**_constants(rank, *TILE, dtype), "UPCAST": False},
            WARPS,
            STAGES,
            usual=rank in (32, 64),
        )
        for rank, dtype in GATES
    ]
