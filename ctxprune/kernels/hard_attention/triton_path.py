"""How do a prompt's queries read only the keys that live? Each block of queries gathers its keys through a list.

Two kernels: the lists, then attention over them. Forward only; gradients take the torch path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ctxprune.kernels.ahead_of_time import FAMILIES, Shipped
from ctxprune.kernels.checks import Refused
from ctxprune.kernels.hard_attention import torch_path
from ctxprune.kernels.hard_attention.patterns import Pattern
from ctxprune.kernels.hard_attention.triton_prefill import list_kernel, prefill_kernel
from ctxprune.kernels.sigmoid.triton_path import check_device, interpreted, on_device, precision
from ctxprune.kernels.soft_attention.triton_shape import DTYPES, SHAPES, check_addresses, generation, strides_of

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


def launch_for(width: int, dtype: torch.dtype, family: str) -> Launch:
    """The largest tile without spills, and as many keys fetched ahead as leave room for a second program."""
    if family == "cdna":
        return Launch((64, 64), warps=4, stages=1)
    if dtype == torch.float32:
        return Launch((32, 64), warps=8, stages=2)
    if family == "hopper":
        return Launch((128, 64), warps=8, stages=3 if width <= 64 else 5)
    return Launch((64, 64), warps=4, stages=5 if width <= 64 else 3)


def drop_time_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    drop_time: Tensor,
    scale: float,
    pattern: Pattern | None = None,
    *,
    tile: tuple[int, int] | None = None,
    lists: int = LISTS,
) -> Tensor:
    """Arguments and result as kernels.drop_time_attention; tile: queries and keys per tile, powers of two from 16 on;
    lists: bytes that lists of keys may take.

    Raises ValueError for float64, widths that differ, patterns of odd blocks, and a device that has no Triton.
    """
    check_device(query)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return torch_path.drop_time_attention(query, key, value, drop_time, scale, pattern)
    dtype = torch.promote_types(query.dtype, torch.promote_types(key.dtype, value.dtype))
    if dtype == torch.float64:
        raise Refused("float64 input: Triton computes in float32; take impl='torch'")
    if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
        widths = [tensor.shape[-1] for tensor in (query, key, value)]
        raise Refused(f"query, key and value of widths {widths}: want one width")
    if query.shape[-1] > WIDEST:
        raise Refused(f"query has width {query.shape[-1]}; Triton takes 1 to {WIDEST}: take impl='torch'")
    q, k, v = (t.to(dtype) if t.stride(-1) == 1 else t.to(dtype).contiguous() for t in (query, key, value))
    check_addresses(q, k, v)
    launch = launch_for(query.shape[-1], dtype, generation(query.device))
    rows, keys = tile or launch.tile
    times = drop_time.clamp(max=query.shape[2]).to(torch.int32).contiguous()
    allowed, pattern_block = times, query.shape[2]  # stand in where there is no pattern: nothing reads them
    if pattern is not None:
        rows, pattern_block = _rows_within(pattern.block, rows), pattern.block
        allowed = pattern.allowed.to(torch.uint8).contiguous()
    batch, heads, n, width = q.shape
    own_lists = drop_time.shape[1] if drop_time.ndim == 3 else 1
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
                times, allowed, listed, whole, total, first, n, capacity, pattern_block, ROWS=rows, CHUNK=CHUNK,
                PATTERN=pattern is not None,
            )  # fmt: skip
            prefill_kernel[(heads, blocks, batch)](
                q, k, v, output, times, listed, whole, total, *strides, heads, groups, own_lists, n, first, blocks,
                capacity, scale * math.log2(math.e), **_constants(width, rows, keys, dtype), num_warps=launch.warps,
                num_stages=launch.stages,
            )  # fmt: skip
    return output.to(query.dtype)


def _rows_within(block: int, most: int) -> int:
    """Queries per tile, at most `most`, such that no tile lies in two blocks of a pattern."""
    rows = min(most, block & -block)  # the largest power of two in it
    if rows < 16:
        raise Refused(f"pattern.block is {block}; Triton takes multiples of 16: take impl='torch'")
    return rows


def _constants(width: int, rows: int, keys: int, dtype: torch.dtype) -> dict[str, object]:
    return {
        "WIDTH": width,
        "PADDED": max(16, triton.next_power_of_2(width)),
        "ROWS": rows,
        "KEYS": keys,
        "PRECISION": precision(dtype),
        "UPCAST": interpreted() and dtype == torch.bfloat16,
    }


def shipped() -> list[Shipped]:
    """The lists, and attention in every shape of triton_shape.SHAPES."""
    found = []
    for family in FAMILIES:
        for rows in sorted({launch_for(shape.width, shape.dtype, family).tile[0] for shape in SHAPES}):
            for patterned in (False, True):
                signature = {
                    **dict.fromkeys(("drop_time", "listed", "whole", "total"), "*i32"),
                    "allowed": "*u8" if patterned else "*i32",
                    **dict.fromkeys(("first_block", "n", "capacity", "pattern_block"), "i32"),
                }
                constants = {"ROWS": rows, "CHUNK": CHUNK, "PATTERN": patterned}
                name = f"prefill list_kernel rows={rows}{' pattern' if patterned else ''}"
                found.append(Shipped(name, list_kernel, signature, constants, 4, 3, (family,)))
        for shape in SHAPES:
            width, dtype = shape.width, shape.dtype
            launch, name = launch_for(width, dtype, family), DTYPES[dtype]
            tile = _constants(width, *launch.tile, dtype) | {"UPCAST": False}
            how = (launch.warps, launch.stages, (family,), shape.usual)
            found.append(Shipped(f"prefill_kernel {shape.name}", prefill_kernel, _signature(name), tile, *how))
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
