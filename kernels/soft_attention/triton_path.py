"""How is soft pruned attention trained on a GPU? Gates once per layer, attention per head, in bounded passes over rows.

Two operators, forward and backward, registered with torch so that torch.compile takes them whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.sigmoid.triton_ops import family
from kernels.sigmoid.triton_path import check_device, has_ptx, on_device
from kernels.soft_attention import triton_backward, triton_forward, triton_gate_backward, triton_gates
from kernels.soft_attention.triton_shape import Shape, generation, new_tiles, strides_of, tile_lists

WIDEST = 128
"""Numbers per head; wider ones would spill."""

TILE = (64, 64)
"""Queries and keys per tile: what fits the registers of every generation from sm_80 on without spilling."""

WORKSPACE = 1 << 29
"""Bytes of tiles in flight. Large enough that one pass fills a GPU (at n = 65,536 it is 4,096 rows of one sequence:
64 row blocks of every head), small beside the memory of any GPU that trains; a constant, where n x n tiles would be
8.6 GB at that length."""


def pruned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    interaction_query: Tensor,
    interaction_key: Tensor,
    beta: Tensor,
    alpha: float,
    guard: Tensor,
    end: Tensor,
    scale: float,
    *,
    tile: tuple[int, int] = TILE,
    workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as kernels.pruned_attention; tile: queries and keys per tile, powers of two from 16 on;
    workspace: bytes that tiles may take. Half precision is computed on tensor cores, float32 in full float32.

    Raises ValueError for float64, widths that differ, and a device that has no Triton.
    """
    check_device(query)
    tensors = (query, key, value, interaction_query, interaction_key)
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        raise ValueError("float64 input: Triton computes in float32; take impl='torch'")
    if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
        raise ValueError(f"query, key and value of widths {[t.shape[-1] for t in tensors[:3]]}: want one width")
    if query.shape[-1] > WIDEST:
        raise ValueError(f"query has width {query.shape[-1]}; Triton takes 1 to {WIDEST}: take impl='torch'")
    attention = torch.promote_types(query.dtype, torch.promote_types(key.dtype, value.dtype))
    gates = torch.promote_types(interaction_query.dtype, interaction_key.dtype)
    query, key, value = (_rows_contiguous(tensor.to(attention)) for tensor in tensors[:3])
    interaction_query, interaction_key = (_rows_contiguous(tensor.to(gates)) for tensor in tensors[3:])
    guard, end = (tensor.to(torch.int32).contiguous() for tensor in (guard, end))
    output, alive, *_ = forward_operator(
        query, key, value, interaction_query, interaction_key, beta, guard, end, alpha, scale, *tile, workspace
    )
    return output, alive


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op("ctxprune::pruned_attention", mutates_args=())
def forward_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    interaction_query: Tensor,
    interaction_key: Tensor,
    beta: Tensor,
    guard: Tensor,
    end: Tensor,
    alpha: float,
    scale: float,
    rows: int,
    keys: int,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """output, alive; and for the backward pass log2 of the softmax's denominators (batch, heads, n), the carries
    (batch, row blocks, keys) and the tiles' classes (batch, row blocks, key blocks)."""
    shape = Shape.of(query, key, interaction_query, rows, keys)
    new: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    output, log_sum, carries, tile_class = _outputs(query, shape)
    carry = torch.zeros(shape.batch, shape.padded, **new)
    alive = torch.zeros(shape.batch, shape.key_blocks, **new)
    numbers = (shape.row_blocks,)
    with on_device(query):
        for first, blocks in shape.passes(workspace, shape.bytes_per_pair):
            local = new_tiles(shape, blocks, torch.float16 if shape.half else torch.float32, query.device)
            total, share = (torch.zeros(shape.batch, blocks, shape.padded, **new) for _ in range(2))
            _launch_gates(
                shape, interaction_query, interaction_key, beta, guard, end, carry, tile_class, local, local,
                total, share, first, blocks, alpha, replay=False,
            )  # fmt: skip
            triton_gates.carry_kernel[(shape.key_blocks, shape.batch)](
                total, share, carry, carries, tile_class, alive, first, *numbers, blocks, shape.key_blocks,
                ROWS=rows, KEYS=keys, num_warps=triton_gates.CARRY_WARPS,
            )  # fmt: skip
            triton_forward.attention_kernel[(shape.heads, blocks, shape.batch)](
                query, key, value, output, log_sum, carries, local, *tile_lists(tile_class[:, first : first + blocks]),
                *strides_of(query, key, value), shape.heads, shape.groups, shape.n, first, *numbers, blocks,
                shape.key_blocks, scale * math.log2(math.e), **shape.attention(),
                num_warps=triton_forward.WARPS, num_stages=triton_forward.STAGES,
            )  # fmt: skip
    return output, alive.sum(1), log_sum, carries, tile_class


def _outputs(query: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        query.new_empty(shape.batch, shape.heads, shape.n, dtype=torch.float32),
        query.new_empty(shape.batch, shape.row_blocks, shape.padded, dtype=torch.float32),
        query.new_empty(shape.batch, shape.row_blocks, shape.key_blocks, dtype=torch.int32),
    )


def _launch_gates(
    shape, interaction_query, interaction_key, beta, guard, end, carry, tile_class, local, slope, total, share,
    first, blocks, alpha, replay,
) -> None:  # fmt: skip
    triton_gates.gate_kernel[(blocks, shape.key_blocks, shape.batch)](
        interaction_query, interaction_key, beta, guard, end, carry, tile_class, local, slope, total, share,
        *strides_of(interaction_query, interaction_key), shape.n, first, shape.row_blocks, blocks, shape.key_blocks,
        alpha - 1.0, 1.0 / math.sqrt(shape.rank), **shape.gates(), **family(alpha), REPLAY=replay, PTX=has_ptx(),
        num_warps=triton_gates.GATE_WARPS, num_stages=2,
    )  # fmt: skip


@forward_operator.register_fake
def _(query, key, value, interaction_query, interaction_key, beta, guard, end, alpha, scale, rows, keys, workspace):
    output, log_sum, carries, tile_class = _outputs(query, Shape.of(query, key, interaction_query, rows, keys))
    return output, query.new_empty(query.shape[0], dtype=torch.float32), log_sum, carries, tile_class


@torch.library.custom_op("ctxprune::pruned_attention_backward", mutates_args=())
def backward_operator(
    d_output: Tensor,
    d_alive: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    interaction_query: Tensor,
    interaction_key: Tensor,
    beta: Tensor,
    guard: Tensor,
    end: Tensor,
    output: Tensor,
    log_sum: Tensor,
    carries: Tensor,
    tile_class: Tensor,
    alpha: float,
    scale: float,
    rows: int,
    keys: int,
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, interaction_query, interaction_key and beta; passes from last to first."""
    shape = Shape.of(query, key, interaction_query, rows, keys)
    # Gradients of sums arrive with strides of 0.
    d_output, d_alive = _rows_contiguous(d_output), d_alive.contiguous()
    d_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    d_iq = torch.empty(interaction_query.shape, dtype=interaction_query.dtype, device=query.device)
    d_key, d_value, d_ik = (
        torch.zeros(tensor.shape, dtype=torch.float32, device=query.device) for tensor in (key, value, interaction_key)
    )
    d_beta = torch.empty(shape.batch, shape.row_blocks, dtype=torch.float32, device=query.device)
    delta, suffix = torch.empty_like(log_sum), torch.zeros_like(carries[:, 0])
    softmax = (log_sum, delta)
    with on_device(query):
        # Beside log I, a pair needs its slope and what the loss wants of it, both float32.
        for first, blocks in reversed(shape.passes(workspace, shape.bytes_per_pair + 8)):
            classes = tile_class[:, first : first + blocks]
            lists, across = tile_lists(classes), tile_lists(classes.transpose(1, 2))
            local = new_tiles(shape, blocks, torch.float16 if shape.half else torch.float32, query.device)
            slope, wanted = (new_tiles(shape, blocks, torch.float32, query.device) for _ in range(2))
            later = torch.empty(shape.batch, blocks, shape.padded, dtype=torch.float32, device=query.device)
            column_sum = torch.zeros_like(later)
            _launch_gates(
                shape, interaction_query, interaction_key, beta, guard, end, carries, tile_class, local, slope,
                later, later, first, blocks, alpha, replay=True,
            )  # fmt: skip
            strides = strides_of(query, key, value, d_output)
            numbers = (shape.heads, shape.groups, shape.n, first, shape.row_blocks, blocks, shape.key_blocks)
            scales = (scale * math.log2(math.e), scale)
            warps, stages = triton_backward.QUERY_LAUNCH
            triton_backward.query_gradient_kernel[(shape.heads, blocks, shape.batch)](
                query, key, value, output, d_output, *softmax, d_query, carries, local, *lists,
                *strides, *numbers, *scales, **shape.attention(), num_warps=warps, num_stages=stages,
            )  # fmt: skip
            warps, stages = triton_backward.key_launch(shape.width, generation(query.device))
            triton_backward.key_gradient_kernel[(key.shape[1], shape.key_blocks, shape.batch)](
                query, key, value, d_output, *softmax, d_key, d_value, carries, local, *across,
                *strides, *numbers, *scales, **shape.attention(), PARTS=triton_backward.PARTS,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
            warps, stages = triton_gate_backward.wanted_launch(generation(query.device))
            triton_gate_backward.wanted_kernel[(blocks, shape.key_blocks, shape.batch)](
                query, key, value, d_output, *softmax, d_alive, carries, tile_class, local, wanted, column_sum,
                *strides, *numbers, scales[0], **shape.attention(), num_warps=warps, num_stages=stages,
            )  # fmt: skip
            triton_gate_backward.suffix_kernel[(shape.key_blocks, shape.batch)](
                column_sum, suffix, later, blocks, shape.key_blocks, KEYS=keys,
                num_warps=triton_gate_backward.SUFFIX_WARPS,
            )  # fmt: skip
            gate_scale = 1.0 / math.sqrt(shape.rank)
            warps, stages = triton_gate_backward.GATE_LAUNCH
            triton_gate_backward.gate_query_gradient_kernel[(blocks, shape.batch)](
                interaction_key, wanted, slope, later, d_iq, d_beta, *lists[:2], *strides_of(interaction_key),
                shape.n, first, shape.row_blocks, blocks, shape.key_blocks, gate_scale, **shape.gates(),
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
            triton_gate_backward.gate_key_gradient_kernel[(shape.key_blocks, shape.batch)](
                interaction_query, wanted, slope, later, d_ik, *across[:2], *strides_of(interaction_query),
                shape.n, first, blocks, shape.key_blocks, gate_scale, **shape.gates(),
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
    # A view of its input would not do: operators return fresh memory.
    d_beta = d_beta.sum().to(beta.dtype).reshape(beta.shape)
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_iq, d_ik.to(interaction_key.dtype), d_beta


@backward_operator.register_fake
def _(d_output, d_alive, query, key, value, interaction_query, interaction_key, beta, *_):
    inputs = (query, key, value, interaction_query, interaction_key, beta)
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.alpha, ctx.scale, ctx.rows, ctx.keys, ctx.workspace = inputs
    seen, _, log_sum, carries, tile_class = output
    ctx.mark_non_differentiable(log_sum, carries, tile_class)
    ctx.save_for_backward(*tensors, seen, log_sum, carries, tile_class)


def _backward(ctx, d_output, d_alive, *_):
    settings = (ctx.alpha, ctx.scale, ctx.rows, ctx.keys, ctx.workspace)
    gradients = backward_operator(d_output, d_alive, *ctx.saved_tensors, *settings)
    return *gradients, None, None, *(None for _ in settings)


forward_operator.register_autograd(_backward, setup_context=_keep)
