"""What is launched for a pass, some row blocks of a segment? Forward three kernels, backward seven.

Tensors by row are those of the whole call; keys come as the segment sees them, by slot (triton_segments.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ctxprune.kernels.sigmoid.triton_path import has_ptx
from ctxprune.kernels.soft_attention import triton_backward, triton_forward, triton_gate_backward, triton_gates
from ctxprune.kernels.soft_attention.triton_segments import Seen
from ctxprune.kernels.soft_attention.triton_shape import Shape, generation, new_tiles, strides_of, tile_lists


class Rows(NamedTuple):
    """What is given by row, and what is one for the call."""

    query: Tensor
    interaction_query: Tensor
    beta: Tensor
    e: Tensor
    flat: bool
    steps: int
    scale: float


class Result(NamedTuple):
    """What the forward pass leaves to the backward pass; carries and classes by slot."""

    output: Tensor  # (batch, heads, n, width)
    log_sum: Tensor  # (batch, heads, n): log2 of the softmax's denominators
    carries: Tensor  # (batch, row blocks, padded): log2 I before each row block
    tile_class: Tensor  # (batch, row blocks, key blocks)


class Gradients(NamedTuple):
    """By row and by key in its own order; what several passes add to is float32 and zero at first."""

    query: Tensor
    key: Tensor
    value: Tensor
    interaction_query: Tensor
    interaction_key: Tensor
    beta: Tensor  # (batch, row blocks): shares


def forward_pass(
    shape: Shape, rows: Rows, seen: Seen, carry: Tensor, alive: Tensor, result: Result, first: int, blocks: int
) -> None:
    """Writes the rows of `result`; carry (batch, padded) becomes that after the pass, alive (batch, key blocks) grows
    by the sum of I."""
    local = new_tiles(shape, blocks, shape.bias_dtype, carry.device)
    total, share = (torch.zeros(shape.batch, blocks, shape.padded, device=carry.device) for _ in range(2))
    tiles = (local, local, total, share)
    _launch_gates(shape, rows, seen, carry, result.tile_class, tiles, first, blocks, replay=False)
    triton_gates.carry_kernel[(shape.key_blocks, shape.batch)](
        total, share, carry, result.carries, result.tile_class, alive, first, shape.row_blocks, blocks,
        shape.key_blocks, ROWS=shape.rows, KEYS=shape.keys, num_warps=triton_gates.CARRY_WARPS,
    )  # fmt: skip
    warps, stages = triton_forward.launch(shape.width, shape.dtype, generation(carry.device))
    triton_forward.attention_kernel[(shape.heads, blocks, shape.batch)](
        rows.query, seen.key, seen.value, result.output, result.log_sum, result.carries, local,
        *tile_lists(result.tile_class[:, first : first + blocks]), *strides_of(rows.query, seen.key, seen.value),
        *_numbers(shape, first, blocks), rows.scale * math.log2(math.e), **shape.attention(), num_warps=warps,
        num_stages=stages,
    )  # fmt: skip


def backward_pass(
    shape: Shape, rows: Rows, seen: Seen, result: Result, d_output: Tensor, d_alive: Tensor, delta: Tensor,
    suffix: Tensor, gradients: Gradients, first: int, blocks: int,
) -> None:  # fmt: skip
    """Writes or adds to `gradients`; suffix (batch, padded) becomes what all rows from this pass on want of each slot's
    log I, delta (batch, heads, n) the sum of output times d_output."""
    device, carries = suffix.device, result.carries
    classes = result.tile_class[:, first : first + blocks]
    lists, across = tile_lists(classes), tile_lists(classes.transpose(1, 2))
    local = new_tiles(shape, blocks, shape.bias_dtype, device)
    slope, wanted = (new_tiles(shape, blocks, torch.float32, device) for _ in range(2))
    later = torch.empty(shape.batch, blocks, shape.padded, dtype=torch.float32, device=device)
    column_sum = torch.zeros_like(later)
    tiles = (local, slope, later, later)
    _launch_gates(shape, rows, seen, carries, result.tile_class, tiles, first, blocks, replay=True)
    inputs = (rows.query, seen.key, seen.value)
    strides, numbers = strides_of(*inputs, d_output), _numbers(shape, first, blocks)
    softmax, scales = (result.log_sum, delta), (rows.scale * math.log2(math.e), rows.scale)
    kind, columns = (shape.width, shape.dtype, generation(device)), _columns(shape, first, blocks)
    warps, stages = triton_backward.query_launch(*kind)
    triton_backward.query_gradient_kernel[(shape.heads, blocks, shape.batch)](
        *inputs, result.output, d_output, *softmax, gradients.query, carries, local, *lists, *strides, *numbers,
        *scales, **shape.attention(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    warps, stages = triton_backward.key_launch(*kind)
    triton_backward.key_gradient_kernel[(seen.key.shape[1], columns, shape.batch)](
        *inputs, d_output, *softmax, gradients.key, gradients.value, seen.home, carries, local, *across, *strides,
        *numbers, *scales, **shape.attention(), PARTS=triton_backward.parts(shape.rows), num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    warps, stages = triton_gate_backward.wanted_launch(*kind)
    triton_gate_backward.wanted_kernel[(blocks, columns, shape.batch)](
        *inputs, d_output, *softmax, d_alive, carries, result.tile_class, local, wanted, column_sum, *strides, *numbers,
        scales[0], **shape.attention(), PIECE=triton_gate_backward.piece(shape.width, shape.dtype), num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    triton_gate_backward.suffix_kernel[(shape.key_blocks, shape.batch)](
        column_sum, suffix, later, blocks, shape.key_blocks, KEYS=shape.keys,
        num_warps=triton_gate_backward.SUFFIX_WARPS,
    )  # fmt: skip
    gate_scale = 1.0 / math.sqrt(shape.rank)
    warps, stages = triton_gate_backward.GATE_LAUNCH
    triton_gate_backward.gate_query_gradient_kernel[(blocks, shape.batch)](
        seen.interaction_key, wanted, slope, later, gradients.interaction_query, gradients.beta, *lists[:2],
        *strides_of(seen.interaction_key), shape.n, first, shape.row_blocks, blocks, shape.key_blocks, gate_scale,
        **shape.gates(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    triton_gate_backward.gate_key_gradient_kernel[(columns, shape.batch)](
        rows.interaction_query, wanted, slope, later, gradients.interaction_key, seen.home, *across[:2],
        *strides_of(rows.interaction_query), shape.n, first, blocks, shape.key_blocks, gate_scale, **shape.gates(),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _numbers(shape: Shape, first: int, blocks: int) -> tuple[int, ...]:
    """The arguments that triton_forward.NUMBERS names."""
    return shape.heads, shape.groups, shape.n, first, shape.row_blocks, blocks, shape.key_blocks


def _columns(shape: Shape, first: int, blocks: int) -> int:
    """Key blocks up to the last row of the pass: there is nothing to see beyond."""
    return min(shape.key_blocks, triton.cdiv((first + blocks) * shape.rows, shape.keys))


def _launch_gates(
    shape: Shape, rows: Rows, seen: Seen, carry: Tensor, tile_class: Tensor, tiles: tuple[Tensor, ...],
    first: int, blocks: int, replay: bool,
) -> None:  # fmt: skip
    triton_gates.gate_kernel[(blocks, _columns(shape, first, blocks), shape.batch)](
        rows.interaction_query, seen.interaction_key, rows.beta, seen.guard, seen.end, carry, tile_class, *tiles,
        *strides_of(rows.interaction_query, seen.interaction_key), shape.n, first, shape.row_blocks, blocks,
        shape.key_blocks, rows.e, 1.0 / math.sqrt(shape.rank), **shape.gates(), REPLAY=replay, FLAT=rows.flat,
        STEPS=rows.steps, PTX=has_ptx(), num_warps=triton_gates.GATE_WARPS, num_stages=2,
    )  # fmt: skip
