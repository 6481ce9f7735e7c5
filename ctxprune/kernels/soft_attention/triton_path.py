"""How is soft pruned attention trained on a GPU? Gates once per layer, attention per head, segment by segment.

Two operators, forward and backward, registered with torch so that torch.compile takes them whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctxprune.kernels.checks import Refused
from ctxprune.kernels.sigmoid.triton_ops import family
from ctxprune.kernels.sigmoid.triton_path import check_device, on_device
from ctxprune.kernels.soft_attention.triton_passes import Gradients, Result, Rows, backward_pass, forward_pass
from ctxprune.kernels.soft_attention.triton_segments import Seen, homes_shape, pack, segment_rows, segments, slots
from ctxprune.kernels.soft_attention.triton_shape import Shape, check_addresses, check_rank, default_tile

WIDEST = 128
"""Numbers per head; wider ones would spill."""

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
    tile: tuple[int, int] | None = None,
    workspace: int = WORKSPACE,
    segment: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as kernels.pruned_attention; tile: queries and keys per tile, powers of two from 16 on;
    workspace: bytes that tiles may take; segment: rows between two looks at which keys live. Half precision is computed
    on tensor cores, and so is float32, in three products each, to its own accuracy.

    Raises ValueError for float64, float32 interactions of rank above 64, widths that differ, and a device that has no
    Triton.
    """
    check_device(query)
    tensors = (query, key, value, interaction_query, interaction_key)
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        raise Refused("float64 input: Triton computes in float32; take impl='torch'")
    if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
        raise Refused(f"query, key and value of widths {[t.shape[-1] for t in tensors[:3]]}: want one width")
    if query.shape[-1] > WIDEST:
        raise Refused(f"query has width {query.shape[-1]}; Triton takes 1 to {WIDEST}: take impl='torch'")
    attention = torch.promote_types(query.dtype, torch.promote_types(key.dtype, value.dtype))
    gates = torch.promote_types(interaction_query.dtype, interaction_key.dtype)
    if attention == torch.float32:  # whose tiles are small: gates in half precision would gain nothing
        gates = attention
    query, key, value = (_rows_contiguous(tensor.to(attention)) for tensor in tensors[:3])
    interaction_query, interaction_key = (_rows_contiguous(tensor.to(gates)) for tensor in tensors[3:])
    check_rank(interaction_query)
    check_addresses(query, key, value, interaction_query, interaction_key)
    # Guards and ends may lie beyond any row, and beyond 32 bits: n says the same.
    guard, end = (tensor.clamp(max=query.shape[2]).to(torch.int32).contiguous() for tensor in (guard, end))
    tile = tile or default_tile(attention, gates)
    segment = segment_rows(query.shape[2], query.shape[0] * query.shape[1], tile[0]) if segment is None else segment
    # Added to a tensor, alpha stays a number that may change where torch compiles the model; handed to an operator, or
    # made a tensor of its own, it would be a constant, and every step of its schedule a compilation.
    e = torch.zeros(1, dtype=torch.float32, device=query.device) + (alpha - 1.0)
    output, alive, *_ = forward_operator(
        query, key, value, interaction_query, interaction_key, beta, e, guard, end, *family(alpha).values(), scale,
        *tile, workspace, segment,
    )  # fmt: skip
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
    e: Tensor,
    guard: Tensor,
    end: Tensor,
    flat: bool,
    steps: int,
    scale: float,
    rows: int,
    keys: int,
    workspace: int,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """output, alive; and for the backward pass the rest of a Result and the keys in each segment's slots."""
    shape = Shape.of(query, key, interaction_query, rows, keys)
    given = Rows(query, interaction_query, beta, e, flat, steps, scale)
    result, homes = _outputs(query, shape, segment)
    carry = torch.zeros(shape.batch, shape.padded, dtype=torch.float32, device=query.device)
    alive = torch.zeros(shape.batch, shape.key_blocks, dtype=torch.float32, device=query.device)
    with on_device(query):
        for home, (start, count) in zip(homes, segments(shape, segment), strict=True):
            home.copy_(slots(carry, end, start * rows))
            place = home.long()
            slot_carry = carry.gather(1, place)
            whole = Seen(home, key, value, interaction_key, guard, end)
            seen = pack(shape, whole, home, slot_carry, start * rows, (start + count) * rows)
            for first, blocks in shape.passes(start, count, workspace, shape.bias_dtype.itemsize):
                forward_pass(shape, given, seen, slot_carry, alive, result, first, blocks)
            carry.scatter_(1, place, slot_carry)
    return result.output, alive.sum(1), *result[1:], homes


def _outputs(query: Tensor, shape: Shape, segment: int) -> tuple[Result, Tensor]:
    return Result(
        torch.empty(query.shape, dtype=query.dtype, device=query.device),
        query.new_empty(shape.batch, shape.heads, shape.n, dtype=torch.float32),
        query.new_empty(shape.batch, shape.row_blocks, shape.padded, dtype=torch.float32),
        query.new_empty(shape.batch, shape.row_blocks, shape.key_blocks, dtype=torch.int32),
    ), query.new_empty(homes_shape(shape, segment), dtype=torch.int32)


@forward_operator.register_fake
def _(query, key, value, interaction_query, *others):
    rows, keys, _, segment = others[-4:]
    result, homes = _outputs(query, Shape.of(query, key, interaction_query, rows, keys), segment)
    return result.output, query.new_empty(query.shape[0], dtype=torch.float32), *result[1:], homes


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
    e: Tensor,
    guard: Tensor,
    end: Tensor,
    output: Tensor,
    log_sum: Tensor,
    carries: Tensor,
    tile_class: Tensor,
    homes: Tensor,
    flat: bool,
    steps: int,
    scale: float,
    rows: int,
    keys: int,
    workspace: int,
    segment: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, interaction_query, interaction_key and beta; segments and passes from last to
    first."""
    shape = Shape.of(query, key, interaction_query, rows, keys)
    given = Rows(query, interaction_query, beta, e, flat, steps, scale)
    result = Result(output, log_sum, carries, tile_class)
    # Gradients of sums arrive with strides of 0.
    d_output, d_alive = _rows_contiguous(d_output), d_alive.contiguous()
    d_query, d_iq = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, interaction_query))
    d_key, d_value, d_ik = (
        torch.zeros(tensor.shape, dtype=torch.float32, device=query.device) for tensor in (key, value, interaction_key)
    )
    d_beta = torch.empty(shape.batch, shape.row_blocks, dtype=torch.float32, device=query.device)
    gradients = Gradients(d_query, d_key, d_value, d_iq, d_ik, d_beta)
    delta, suffix = torch.empty_like(log_sum), torch.zeros_like(carries[:, 0])
    with on_device(query):
        for home, (start, count) in reversed(list(zip(homes, segments(shape, segment), strict=True))):
            place, whole = home.long(), Seen(home, key, value, interaction_key, guard, end)
            seen = pack(shape, whole, home, carries[:, start], start * rows, (start + count) * rows)
            slot_suffix = suffix.gather(1, place)
            # Beside log I, a pair needs its slope and what the loss wants of it, both float32.
            for first, blocks in reversed(shape.passes(start, count, workspace, shape.bias_dtype.itemsize + 8)):
                backward_pass(
                    shape, given, seen, result, d_output, d_alive, delta, slot_suffix, gradients, first, blocks
                )
            suffix.scatter_(1, place, slot_suffix)
    # A view of its input would not do: operators return fresh memory.
    d_beta = d_beta.sum().to(beta.dtype).reshape(beta.shape)
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_iq, d_ik.to(interaction_key.dtype), d_beta


@backward_operator.register_fake
def _(d_output, d_alive, query, key, value, interaction_query, interaction_key, beta, *_):
    inputs = (query, key, value, interaction_query, interaction_key, beta)
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs)


def _keep(ctx, inputs, output) -> None:
    tensors, ctx.settings = inputs[:9], inputs[9:]
    attended, _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*tensors, attended, *kept)


def _backward(ctx, d_output, d_alive, *_):
    gradients = backward_operator(d_output, d_alive, *ctx.saved_tensors, *ctx.settings)
    return *gradients, None, None, None, *(None for _ in ctx.settings)


forward_operator.register_autograd(_backward, setup_context=_keep)
