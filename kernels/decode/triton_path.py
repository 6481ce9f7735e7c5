"""How is one decoding step launched on a GPU? Three kernels, each of a grid that only shapes decide.

How many slots a row has is read on the device. Nothing waits for the host, so that a step can be captured in a CUDA
graph and played again.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from kernels.ahead_of_time import Shipped
from kernels.decode.pages import Pages
from kernels.decode.triton_step import combine_kernel, split_kernel, store_kernel
from kernels.sigmoid.triton_path import check_device, interpreted, on_device

WIDEST = 128
"""Numbers per head; wider ones would spill."""

PROGRAMS = 528
"""Programs that keep the memory of the GPUs we know busy (132 multiprocessors, four each)."""

MOST_SPLITS = 64
"""Splits of a row at most: the last kernel reads one running softmax each."""

WARPS, STAGES = 4, 3


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

    Raises ValueError for float64, heads wider than 128, and a device that has no Triton.
    """
    check_device(query)
    if torch.float64 in (query.dtype, pages.keys.dtype):
        raise ValueError("float64 input: Triton computes in float32; take impl='torch'")
    rows, heads, width = query.shape
    if width > WIDEST:
        raise ValueError(f"query has width {width}; Triton takes 1 to {WIDEST}: take impl='torch'")
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
    ranks = {"RANK": rank, "PADDED_RANK": max(16, triton.next_power_of_2(rank)), "GATED": gated}
    with on_device(query):
        store_kernel[(kv_heads, rows)](
            key, value, gate_key, step, guard, drop_time, pages.keys, pages.values, gate_keys, pages.drop_time,
            pages.guard, *state, pages.refused, kv_heads, most, **widths, **ranks, num_warps=1,
        )  # fmt: skip
        split_kernel[(splits, kv_heads, rows)](
            query, gate_query, offset, step, pages.keys, pages.values, gate_keys, pages.drop_time, pages.guard,
            *state, split_top, split_sum, split_seen, split_free, kv_heads, most, splits, scale * math.log2(math.e),
            1.0 / math.sqrt(rank), **widths, **ranks, **_groups(groups, pages.keys.dtype), num_warps=WARPS,
            num_stages=STAGES,
        )  # fmt: skip
        combine_kernel[(heads, rows)](
            output, split_top, split_sum, split_seen, split_free, step, *state, heads, most, splits, **widths,
            SPLITS=triton.next_power_of_2(splits), num_warps=WARPS,
        )  # fmt: skip
    return output


def _splits(programs: int, most: int) -> int:
    """Splits per row: no more than it may have pages, and none needed where rows and heads fill the GPU."""
    return max(1, min(most, MOST_SPLITS, triton.cdiv(PROGRAMS, programs)))


def _widths(width: int, page: int) -> dict[str, object]:
    return {"WIDTH": width, "PADDED": max(16, triton.next_power_of_2(width)), "PAGE": page}


def _groups(groups: int, dtype: torch.dtype) -> dict[str, object]:
    """Query heads per key/value head, padded to what tensor cores take."""
    exact = dtype == torch.float32 or torch.version.hip is not None
    return {
        "GROUPS": groups,
        "PADDED_GROUPS": max(16, triton.next_power_of_2(groups)),
        "PRECISION": "ieee" if exact else "tf32",
        "UPCAST": interpreted() and dtype == torch.bfloat16,
    }


def shipped() -> list[Shipped]:
    """Pages of 64 at every width in bfloat16, gated by rank 64 and, at width 64, not gated."""
    found = []
    integers = ("step", "drop_times", "guards", "table", "used", "free")
    for width, gated in ((32, True), (64, True), (64, False), (80, True), (96, True), (128, True)):
        widths, name = _widths(width, 64), f"width={width} {'gated' if gated else 'no gates'}"
        ranks = {"RANK": 64, "PADDED_RANK": 64, "GATED": gated}
        found += [
            Shipped(
                f"decode store_kernel {name}",
                store_kernel,
                {
                    **dict.fromkeys(("key", "value", "interaction_key", "keys", "values", "interactions"), "*bf16"),
                    **dict.fromkeys((*integers, "guard", "drop_time", "refused"), "*i32"),
                    **dict.fromkeys(("kv_heads", "most"), "i32"),
                },
                {**widths, **ranks},
                1,
                3,
            ),
            Shipped(
                f"decode split_kernel {name}",
                split_kernel,
                {
                    **dict.fromkeys(("query", "interaction_query", "beta", "keys", "values", "interactions"), "*bf16"),
                    **dict.fromkeys((*integers, "split_free"), "*i32"),
                    **dict.fromkeys(("split_top", "split_sum", "split_seen"), "*fp32"),
                    **dict.fromkeys(("kv_heads", "most", "splits"), "i32"),
                    **dict.fromkeys(("score_scale", "gate_scale"), "fp32"),
                },
                {**widths, **ranks, **_groups(1, torch.bfloat16), "UPCAST": False},
                WARPS,
                STAGES,
            ),
            Shipped(
                f"decode combine_kernel {name}",
                combine_kernel,
                {
                    "output": "*bf16",
                    **dict.fromkeys(("split_top", "split_sum", "split_seen"), "*fp32"),
                    **dict.fromkeys(("split_free", "step", "table", "used", "free"), "*i32"),
                    **dict.fromkeys(("heads", "most", "splits"), "i32"),
                },
                {**widths, "SPLITS": 16},
                WARPS,
                3,
            ),
        ]
    return found
