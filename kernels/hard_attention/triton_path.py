"""How do a prompt's queries read only the keys that live? Each block of queries gathers its keys through a list.

Two kernels: the lists, then attention over them. Forward only; gradients take the torch path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead_of_time import Shipped
from kernels.hard_attention import torch_path
from kernels.sigmoid.triton_path import check_device, interpreted, on_device
from kernels.soft_attention.triton_shape import generation, strides_of
from kernels.soft_attention.triton_tiles import GONE, head_base, load_rows, store_rows

WIDEST = 128
"""Numbers per head; wider ones would spill."""

LISTS = 1 << 28
"""Bytes of lists in flight: one pass up to n = 65,536 with blocks of 128 queries and one list per layer."""

CHUNK = 1024
"""Keys looked at in one go while a list is made."""


@dataclass(frozen=True)
class Launch:
    """Queries and keys per tile, and how it is launched."""

    tile: tuple[int, int]
    warps: int
    stages: int


BY_FAMILY = {
    "hopper": Launch((128, 64), warps=8, stages=3),
    "ampere": Launch((64, 64), warps=4, stages=3),
    "cdna": Launch((64, 64), warps=4, stages=1),
}


@triton.jit
def _append(todo, filled, key, wanted):
    """Write the wanted keys behind the `filled` ones; returns how many there are then."""
    wanted = wanted.to(tl.int32)
    tl.store(todo + filled + tl.cumsum(wanted, axis=0) - wanted, key, mask=wanted == 1)
    return filled + tl.sum(wanted, axis=0)


@triton.jit
def list_kernel(drop_time, listed, whole, total, first_block, n, capacity, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Grid: row blocks of the pass x lists (batch * groups). drop_time (lists, n).

    Writes listed (lists, blocks, capacity): the keys that every query of the block sees, then those that some see;
    whole and total (lists, blocks): how many of the first, and of both.
    """
    block, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = (first_block + block) * ROWS
    stop = tl.minimum(start + ROWS, n)
    own = group * tl.num_programs(0) + block
    todo = listed + own * capacity
    filled = 0
    for chunk in range(0, start, CHUNK):
        key = chunk + tl.arange(0, CHUNK)
        time = tl.load(drop_time + group * n + key, mask=key < start, other=0)
        filled = _append(todo, filled, key, time >= stop)
    tl.store(whole + own, filled)
    for chunk in range(0, stop, CHUNK):
        key = chunk + tl.arange(0, CHUNK)
        time = tl.load(drop_time + group * n + key, mask=key < stop, other=0)
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


@triton.jit
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


def drop_time_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    drop_time: Tensor,
    scale: float,
    *,
    tile: tuple[int, int] | None = None,
    lists: int = LISTS,
) -> Tensor:
    """Arguments and result as kernels.drop_time_attention; tile: queries and keys per tile, powers of two from 16 on;
    lists: bytes that lists of keys may take.

    Raises ValueError for float64, widths that differ, and a device that has no Triton.
    """
    check_device(query)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return torch_path.drop_time_attention(query, key, value, drop_time, scale)
    dtype = torch.promote_types(query.dtype, torch.promote_types(key.dtype, value.dtype))
    if dtype == torch.float64:
        raise ValueError("float64 input: Triton computes in float32; take impl='torch'")
    if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
        widths = [tensor.shape[-1] for tensor in (query, key, value)]
        raise ValueError(f"query, key and value of widths {widths}: want one width")
    if query.shape[-1] > WIDEST:
        raise ValueError(f"query has width {query.shape[-1]}; Triton takes 1 to {WIDEST}: take impl='torch'")
    q, k, v = (t.to(dtype) if t.stride(-1) == 1 else t.to(dtype).contiguous() for t in (query, key, value))
    launch = BY_FAMILY[generation(query.device)]
    rows, keys = tile or launch.tile
    batch, heads, n, width = q.shape
    own_lists = drop_time.shape[1] if drop_time.ndim == 3 else 1
    times = drop_time.clamp(max=n).to(torch.int32).contiguous()
    output = torch.empty(batch, heads, n, width, dtype=dtype, device=q.device)
    strides, groups = strides_of(q, k, v), heads // k.shape[1]
    capacity, row_blocks = triton.cdiv(n, keys) * keys, triton.cdiv(n, rows)
    step = max(1, min(row_blocks, lists // (4 * batch * own_lists * capacity)))
    with on_device(q):
        for first in range(0, row_blocks, step):
            blocks = min(step, row_blocks - first)
            listed = torch.empty(batch * own_lists, blocks, capacity, dtype=torch.int32, device=q.device)
            whole, total = torch.empty(2, batch * own_lists, blocks, dtype=torch.int32, device=q.device)
            list_kernel[(blocks, batch * own_lists)](
                times, listed, whole, total, first, n, capacity, ROWS=rows, CHUNK=CHUNK
            )
            prefill_kernel[(heads, blocks, batch)](
                q, k, v, output, times, listed, whole, total, *strides, heads, groups, own_lists, n, first, blocks,
                capacity, scale * math.log2(math.e), **_constants(width, rows, keys, dtype), num_warps=launch.warps,
                num_stages=launch.stages,
            )  # fmt: skip
    return output.to(query.dtype)


def _constants(width: int, rows: int, keys: int, dtype: torch.dtype) -> dict[str, object]:
    return {
        "WIDTH": width,
        "PADDED": max(16, triton.next_power_of_2(width)),
        "ROWS": rows,
        "KEYS": keys,
        "PRECISION": "ieee" if dtype == torch.float32 or torch.version.hip is not None else "tf32",
        "UPCAST": interpreted() and dtype == torch.bfloat16,
    }


def shipped() -> list[Shipped]:
    """The lists, and attention at every width in bfloat16, at width 64 in the other types."""
    found = []
    for family, launch in BY_FAMILY.items():
        rows, keys = launch.tile
        found.append(
            Shipped(
                f"prefill list_kernel rows={rows}",
                list_kernel,
                {
                    **dict.fromkeys(("drop_time", "listed", "whole", "total"), "*i32"),
                    **dict.fromkeys(("first_block", "n", "capacity"), "i32"),
                },
                {"ROWS": rows, "CHUNK": CHUNK},
                4,
                3,
                (family,),
            )
        )
        for width, name in ((32, "bf16"), (64, "bf16"), (64, "fp16"), (80, "bf16"), (96, "bf16"), (128, "bf16")):
            found.append(
                Shipped(
                    f"prefill_kernel width={width} {name}",
                    prefill_kernel,
                    _signature(name),
                    {**_constants(width, rows, keys, torch.bfloat16), "UPCAST": False},
                    launch.warps,
                    launch.stages,
                    (family,),
                )
            )
    return found


def _signature(dtype: str) -> dict[str, str]:
    strides = [f"{name}_{axis}stride" for name in ("query", "key", "value") for axis in ("batch_", "head_", "")]
    numbers = ["heads", "groups", "lists", "n", "first_block", "blocks", "capacity"]
    return {
        **dict.fromkeys(("query", "key", "value", "output"), f"*{dtype}"),
        **dict.fromkeys(("drop_time", "listed", "whole", "total"), "*i32"),
        **dict.fromkeys(strides + numbers, "i32"),
        "score_scale": "fp32",
    }
