"""How is soft pruned attention trained without an n x n tensor? Block by block, every gradient by hand."""

from __future__ import annotations

import math
from itertools import islice

import torch
from torch import Tensor

from ctxprune.kernels.soft_attention.torch_segments import (
    Keys,
    Layer,
    blocks,
    living_keys,
    segment_size,
    taken,
    without_last,
)

KEEP_GATES_UP_TO = 1024
"""Tokens up to which the backward pass keeps the solved gates (8 bytes per pair and layer) instead of solving them
again: a sixth of a training step at n = 256; beyond, memory would grow with n^2."""

KEEP_WEIGHTS_UP_TO = 1 << 24
"""Attention weights (batch x heads x n x n) up to which they are kept for the backward pass: 32 MB a layer in
float32."""


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
) -> tuple[Tensor, Tensor]:
    """Arguments and results as kernels.pruned_attention; the derivation is in README.md beside this file."""
    tensors = (query, key, value, interaction_query, interaction_key)
    if len(query) == 1 or segment_size(query) == query.shape[2]:
        return _PrunedAttention.apply(*tensors, beta, guard, end, alpha, scale)
    rows = zip(*(tensor.split(1) for tensor in (*tensors, guard, end)), strict=True)
    parts = [_PrunedAttention.apply(*row[:5], beta, *row[5:], alpha, scale) for row in rows]
    return torch.cat([output for output, _ in parts]), torch.cat([alive for _, alive in parts])


class _PrunedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, interaction_query, interaction_key, beta, guard, end, alpha, scale):
        inputs = [query, key, value, interaction_query, interaction_key, beta, guard, end]
        layer = Layer.of(inputs, alpha, scale)
        batch, heads, n, _ = query.shape
        output = layer.query.new_empty(batch, heads, n, value.shape[-1])
        carry, alive = layer.query.new_zeros(batch, n), layer.query.new_zeros(batch)
        keep_gates, keep_weights = n <= KEEP_GATES_UP_TO, batch * heads * n * n <= KEEP_WEIGHTS_UP_TO
        living, carries, gates, attention = [], [], [], []
        for begin, finish in layer.segments():
            living.append(living_keys(carry, end, begin, finish))
            keys, now = layer.keys(living[-1], finish), taken(carry, living[-1], finish)
            for start, stop in blocks(begin, finish):
                seen = Keys(*(without_last(tensor, finish - stop) for tensor in keys))
                before = without_last(now, finish - stop)
                carries += [] if keep_gates else [before.clone()]
                log_alive, slope = layer.survival(seen, before, start, stop)
                before.copy_(log_alive[:, -1])
                alive += log_alive.exp().sum((1, 2)) - (stop - start)  # the diagonal does not count
                weights = layer.weights(seen, log_alive, start, stop)
                output[:, :, start:stop] = (weights @ seen.value).view(batch, heads, stop - start, -1)
                gates += [log_alive, slope] if keep_gates else []
                attention += [weights] if keep_weights else []
            if living[-1] is not None:
                carry.index_copy_(1, living[-1], now)
        ctx.save_for_backward(*inputs, *living, *carries, *gates, *attention)
        ctx.counts = [len(part) for part in (inputs, living, carries, gates, attention)]
        ctx.alpha, ctx.scale = alpha, scale
        return output.to(query.dtype), alive

    @staticmethod
    def backward(ctx, d_output, d_alive):
        saved = iter(ctx.saved_tensors)
        inputs, living, carries, gates, attention = (list(islice(saved, count)) for count in ctx.counts)
        layer = Layer.of(inputs, ctx.alpha, ctx.scale)
        gradients = _Gradients(layer, d_output, d_alive)
        for begin, finish in reversed(layer.segments()):
            among = living.pop()
            keys, own = layer.keys(among, finish), gradients.of_keys(among, finish)
            for start, stop in reversed(list(blocks(begin, finish))):
                seen = Keys(*(without_last(tensor, finish - stop) for tensor in keys))
                if gates:
                    slope, log_alive = gates.pop(), gates.pop()
                else:
                    log_alive, slope = layer.survival(seen, carries.pop(), start, stop)
                weights = attention.pop() if attention else layer.weights(seen, log_alive, start, stop)
                *d_seen, wanted = (without_last(tensor, finish - stop) for tensor in own)
                gradients.add_block(seen, d_seen, wanted, log_alive, slope, weights, start, stop)
            gradients.put_back(among, own)
        found = zip(gradients.of_inputs(), inputs[:6], strict=True)
        return *(gradient.to(tensor.dtype) for gradient, tensor in found), None, None, None, None


class _Gradients:
    """What the loss wants of each input, added up from the last block of queries to the first."""

    def __init__(self, layer: Layer, d_output: Tensor, d_alive: Tensor) -> None:
        self.layer = layer
        self.output = d_output.to(layer.query.dtype)
        self.alive = d_alive.to(layer.query.dtype)[:, None, None]
        self.query, self.interaction_query = torch.empty_like(layer.query), torch.empty_like(layer.interaction_query)
        self.beta = torch.zeros_like(layer.beta)
        keys = (layer.key, layer.value, layer.interaction_key)
        # The last: what later queries want of log I of each key, (batch, n).
        self.per_key = [*map(torch.zeros_like, keys), layer.query.new_zeros(layer.guard.shape)]

    def of_keys(self, living: Tensor | None, finish: int) -> list[Tensor]:
        """Gradients by a segment's keys, values and interaction keys, and what is wanted of their log I so far."""
        return [taken(tensor, living, finish) for tensor in self.per_key]

    def put_back(self, living: Tensor | None, own: list[Tensor]) -> None:
        """Write what of_keys gave; views are already in place."""
        if living is not None:
            for whole, part in zip(self.per_key, own, strict=True):
                whole.index_copy_(2 if whole.ndim == 4 else 1, living, part)

    def add_block(self, seen: Keys, d_seen, wanted: Tensor, log_alive, slope, weights, start: int, stop: int) -> None:
        """Add what the queries start to stop - 1 want; d_seen and wanted, as of_keys gives them, change in place."""
        layer, rows = self.layer, slice(start, stop)
        d_key, d_value, d_interaction_key = d_seen
        batch, kv_heads, count, width = seen.key.shape
        d_output = self.output[:, :, rows].reshape(batch, kv_heads, -1, seen.value.shape[-1])
        d_value += weights.transpose(2, 3) @ d_output
        # p (dp - sum p dp) in one pass.
        d_logits = torch._softmax_backward_data(d_output @ seen.value.transpose(2, 3), weights, -1, weights.dtype)
        self.query[:, :, rows] = (d_logits @ seen.key).mul_(layer.scale).view(batch, -1, stop - start, width)
        queries = layer.query[:, :, rows].reshape(batch, kv_heads, -1, width)
        d_key += (d_logits.transpose(2, 3) @ queries).mul_(layer.scale)
        # dLoss/dlog I: all heads share one I, and the sum of I asks for more of it.
        d_log_alive = d_logits.view(batch, -1, stop - start, count).sum(1).addcmul_(self.alive, log_alive.exp())
        # Reverse running sum over the block's queries: everything from this query on depends on this gate. Not the
        # total less a running sum: what that leaves of rounding is multiplied by 1/gate where a gate is almost 0.
        # (On the diagonal, where no gate acts, nothing is multiplied by it.)
        after = d_log_alive.flip(1).cumsum(1).flip(1).add_(wanted[:, None])
        wanted.copy_(after[:, 0])
        d_x = after.mul_(slope)
        gate_scale = 1.0 / math.sqrt(layer.interaction_query.shape[-1])
        self.interaction_query[:, rows] = (d_x @ seen.interaction).mul_(gate_scale)
        d_interaction_key += (d_x.transpose(1, 2) @ layer.interaction_query[:, rows]).mul_(gate_scale)
        self.beta += d_x.sum()

    def of_inputs(self) -> list[Tensor]:
        """In the order of the arguments of pruned_attention."""
        d_key, d_value, d_interaction_key, _ = self.per_key
        return [self.query, d_key, d_value, self.interaction_query, d_interaction_key, self.beta]
