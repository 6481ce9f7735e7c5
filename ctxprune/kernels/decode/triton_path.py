"""How is one decoding step launched on a GPU? Three kernels, each of a grid that only shapes decide.

How many slots a row has is read on the device. Nothing waits for the host, so that a step can be captured in a CUDA
graph and played again.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from ctxprune.kernels.ahead_of_time import FAMILIES, Shipped
from ctxprune.kernels.checks import Refused
from ctxprune.kernels.decode.pages import PAGE_SIZES, Pages
from ctxprune.kernels.decode.triton_step import combine_kernel, split_kernel, store_kernel
from ctxprune.kernels.sigmoid.triton_path import check_device, interpreted, on_device, precision
from ctxprune.kernels.soft_attention.triton_shape import DTYPES, RANKS, WIDTHS, generation

WIDEST = 128
"""Numbers per head; wider ones would spill."""

PROGRAMS = 528
"""Programs that keep the memory of the GPUs we know busy (132 multiprocessors, four each)."""

MOST_SPLITS = 64
"""Splits of a row at most: the last kernel reads one running softmax each."""

COMBINE_WARPS = 4


def launch_for(dtype: torch.dtype, page: int, family: str) -> tuple[int, int]:
    """Warps and pages in flight of split_kernel: those without spills."""
    if family == "cdna":
        return 4, 1 if dtype == torch.float32 or page > 64 else 3
    return (8, 2) if dtype == torch.float32 else (4, 3)


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    interaction_query: Tensor | None,
    interaction_key: Tensor | None,
    beta: Tensor | None,
    step: Tensor,
    guard: Tensor,
    drop_time: Tensor,
    pages: Pages,
    scale: float,
    *,
    splits: int | None = None,
) -> Tensor:
    """Arguments and result as kernels.decode_attention; splits: programs that share a row's pages (by default as
    many as fill a GPU).

    Raises ValueError for float64, heads wider than 128, pages too large for wide float32 heads, and a device that has
    no Triton.
    """
    check_device(query)
    gate_type = query.dtype if interaction_query is None else interaction_query.dtype
    if torch.float64 in (query.dtype, pages.keys.dtype, gate_type):
        raise Refused("float64 input: Triton computes in float32; take impl='torch'")
    rows, heads, width = query.shape
    if width > WIDEST:
        raise Refused(f"query has width {width}; Triton takes 1 to {WIDEST}: take impl='torch'")
    if not fits(width, pages.keys.dtype, pages.page):
        raise Refused(f"pages of {pages.page} slots: Triton takes 16, 32 and 64 for float32 heads wider than 64")
    if interaction_query is not None and interaction_query.shape[-1] > RANKS[-1]:
        raise Refused(f"gates of rank {interaction_query.shape[-1]}: Triton takes 1 to {RANKS[-1]}")
    kv_heads, most = key.shape[1], pages.table.shape[1]
    groups = heads // kv_heads
    splits = _splits(rows * kv_heads, most) if splits is None else splits
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    split_top, split_sum = query.new_empty(2, rows, heads, splits, dtype=torch.float32)
    split_seen = query.new_empty(rows, heads, splits, width, dtype=torch.float32)
    split_free = query.new_empty(rows, splits, dtype=torch.int32)
    query, key, value, step, guard, drop_time = (t.contiguous() for t in (query, key, value, step, guard, drop_time))
    if interaction_query is None or interaction_key is None or beta is None or pages.interaction is None:
        # Some pointer must stand in; nothing reads it.
        gated, rank, gate_query, gate_key, gate_keys, offset = False, 16, query, key, pages.keys, query
    else:
        gated, rank, gate_keys, offset = True, interaction_query.shape[-1], pages.interaction, beta
        gate_query, gate_key = interaction_query.contiguous(), interaction_key.contiguous()
    state = (pages.table, pages.used, pages.free)
    widths = _widths(width, pages.page)
    warps, stages = launch_for(pages.keys.dtype, pages.page, generation(query.device))
    ranks = {"RANK": rank, "PADDED_RANK": max(16, triton.next_power_of_2(rank)), "GATED": gated}
    with on_device(query):
        store_kernel[(kv_heads, rows)](
            key, value, gate_key, step, guard, drop_time, pages.keys, pages.values, gate_keys, pages.drop_time,
            pages.guard, pages.position, *state, pages.refused, kv_heads, most, **widths, **ranks, num_warps=1,
        )  # fmt: skip
        split_kernel[(splits, kv_heads, rows)](
            query, gate_query, offset, step, pages.keys, pages.values, gate_keys, pages.drop_time, pages.guard,
            *state, split_top, split_sum, split_seen, split_free, kv_heads, most, splits, scale * math.log2(math.e),
            1.0 / math.sqrt(rank), **widths, **ranks, **_groups(groups, pages.keys.dtype), num_warps=warps,
            num_stages=stages,
        )  # fmt: skip
        combine_kernel[(heads, rows)](
            output, split_top, split_sum, split_seen, split_free, step, *state, heads, most, splits, **widths,
            SPLITS=triton.next_power_of_2(splits), num_warps=COMBINE_WARPS,
        )  # fmt: skip
    return output


def takes(width: int, dtype: torch.dtype, page: int, rank: int = 0) -> bool:
    """Whether such heads over such pages, under gates of such a rank, are not refused."""
    return dtype != torch.float64 and width <= WIDEST and rank <= RANKS[-1] and fits(width, dtype, page)


def fits(width: int, dtype: torch.dtype, page: int) -> bool:
    """Whether a page of such heads fits a program."""
    return dtype != torch.float32 or width <= 64 or page <= 64


def _splits(programs: int, most: int) -> int:
    """Splits per row: no more than it may have pages, and none needed where rows and heads fill the GPU."""
    return max(1, min(most, MOST_SPLITS, triton.cdiv(PROGRAMS, programs)))


def _widths(width: int, page: int) -> dict[str, object]:
    return {"WIDTH": width, "PADDED": max(16, triton.next_power_of_2(width)), "PAGE": page}


def _groups(groups: int, dtype: torch.dtype) -> dict[str, object]:
    """Query heads per key/value head, padded to what tensor cores take."""
    return {
        "GROUPS": groups,
        "PADDED_GROUPS": max(16, triton.next_power_of_2(groups)),
        "PRECISION": precision(dtype),
        "UPCAST": interpreted() and dtype == torch.bfloat16,
    }


_Variant = tuple[int, int | None, torch.dtype, int]
"""Width, rank of the gates (None without), type, slots per page."""


def shipped() -> list[Shipped]:
    """Every width, in bfloat16 and float32, gated by rank 64, pages of 64; at widths 64 and 128 not gated too, and
    every other page and rank."""

    usual: list[_Variant] = [(width, 64, torch.bfloat16, 64) for width in WIDTHS] + [(64, None, torch.bfloat16, 64)]
    usual += [(64, 64, torch.float32, 64), (128, 64, torch.float32, 64)]
    usual += [(128, 64, torch.bfloat16, 128), (64, 64, torch.float32, 128)]
    rarer: list[_Variant] = [(width, 64, torch.float32, 64) for width in WIDTHS]
    for width in (64, 128):
        for dtype in (torch.bfloat16, torch.float32):
            rarer += [(width, rank, dtype, 64) for rank in (None, *RANKS)]
            rarer += [(width, 64, dtype, page) for page in PAGE_SIZES if fits(width, dtype, page)]
    return [shipped for variant in dict.fromkeys(usual + rarer) for shipped in _shipped(*variant, variant in usual)]


def _shipped(width: int, rank: int | None, dtype: torch.dtype, page: int, usual: bool) -> list[Shipped]:
    sizes, pointer = _widths(width, page), f"*{DTYPES[dtype]}"
    ranks = {"RANK": rank or 16, "PADDED_RANK": rank or 16, "GATED": rank is not None}
    name = f"width={width} {DTYPES[dtype]} page={page} {'no gates' if rank is None else f'rank={rank}'}"
    integers = ("step", "drop_times", "guards", "table", "used", "free")
    sums = dict.fromkeys(("split_top", "split_sum", "split_seen"), "*fp32")
    store = {
        **dict.fromkeys(("key", "value", "interaction_key", "keys", "values", "interactions"), pointer),
        **dict.fromkeys((*integers, "guard", "drop_time", "positions", "refused"), "*i32"),
        **dict.fromkeys(("kv_heads", "most"), "i32"),
    }
    split = {
        **dict.fromkeys(("query", "interaction_query", "beta", "keys", "values", "interactions"), pointer),
        **dict.fromkeys((*integers, "split_free"), "*i32"),
        **sums,
        **dict.fromkeys(("kv_heads", "most", "splits"), "i32"),
        **dict.fromkeys(("score_scale", "gate_scale"), "fp32"),
    }
    combine = {
        "output": pointer,
        **sums,
        **dict.fromkeys(("split_free", "step", "table", "used", "free"), "*i32"),
        **dict.fromkeys(("heads", "most", "splits"), "i32"),
    }
    constants = {**sizes, **ranks, **_groups(1, dtype), "UPCAST": False}
    found = [Shipped(f"decode store_kernel {name}", store_kernel, store, {**sizes, **ranks}, 1, 3, FAMILIES, usual)]
    if rank == 64:  # this one reads no interactions
        whole = {**sizes, "SPLITS": 16}
        how = (COMBINE_WARPS, 3, FAMILIES, usual)
        found.append(Shipped(f"decode combine_kernel {name}", combine_kernel, combine, whole, *how))
    for family in FAMILIES:
        how = (*launch_for(dtype, page, family), (family,), usual)
        found.append(Shipped(f"decode split_kernel {name}", split_kernel, split, constants, *how))
    return found
