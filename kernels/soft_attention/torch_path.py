"""How is soft pruned attention trained without an n x n tensor? Blocks of queries, and one running sum per key."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.sigmoid.torch_path import LOG_ZERO, log_alpha_sigmoid

KEEP_GATES_UP_TO = 1024
"""Tokens up to which the backward pass keeps the solved gates (8 bytes per pair and layer) instead of solving them
again: a sixth of a training step at n = 256; beyond, memory would grow with n^2."""

KEEP_WEIGHTS_UP_TO = 1 << 24
"""Attention weights (batch x heads x n x n) up to which they are kept for the backward pass: 32 MB a layer in
float32."""

DEAD = -90.0
"""exp(-90) is below the smallest normal float32 (1.2e-38): a key this far gone no longer counts, nor do its gates."""

BLOCK = 64
"""Queries per block. Measured on 2 cores at n = 256: 64 is fastest; kept memory is n^2/BLOCK per row of the batch."""


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
    """Arguments and results as kernels.pruned_attention; every gradient by hand (README.md beside this file)."""
    return _PrunedAttention.apply(query, key, value, interaction_query, interaction_key, beta, alpha, guard, end, scale)


class _PrunedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, interaction_query, interaction_key, beta, alpha, guard, end, scale):
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        q, k, v, iq, ik, offset = (t.to(work) for t in (query, key, value, interaction_query, interaction_key, beta))
        batch, heads, n, _ = q.shape
        output = torch.empty(batch, heads, n, v.shape[-1], dtype=work, device=q.device)
        carry = torch.zeros(batch, n, dtype=work, device=q.device)
        keep_gates, keep_weights = n <= KEEP_GATES_UP_TO, batch * heads * n * n <= KEEP_WEIGHTS_UP_TO
        carries, gates, kept, alive = [], [], [], torch.zeros(batch, dtype=work, device=q.device)
        for start in range(0, n, BLOCK):
            stop = min(n, start + BLOCK)
            carries.append(carry[:, :stop].clone())
            log_gate, slope = _gates(iq, ik, offset, alpha, guard, end, carries[-1], start, stop)
            bias = log_gate.cumsum(1).add_(carries[-1][:, None])
            if keep_gates:
                gates += [bias, slope]
            carry[:, :stop] = bias[:, -1]
            alive += torch.exp(_strictly_below(bias, start)).sum((1, 2))
            weights = _weights(q, k, bias, scale, start, stop)
            if keep_weights:
                kept.append(weights)
            output[:, :, start:stop] = (weights @ v[:, :, :stop]).view(batch, heads, stop - start, -1)
        ctx.save_for_backward(
            query, key, value, interaction_query, interaction_key, beta, guard, end, *carries, *gates, *kept
        )
        ctx.blocks, ctx.kept_gates = len(carries), len(gates)
        ctx.alpha, ctx.scale, ctx.work = alpha, scale, work
        return output.to(query.dtype), alive

    @staticmethod
    def backward(ctx, d_output, d_alive):
        query, key, value, interaction_query, interaction_key, beta, guard, end, *rest = ctx.saved_tensors
        carries, rest = rest[: ctx.blocks], rest[ctx.blocks :]
        gates, kept = rest[: ctx.kept_gates], rest[ctx.kept_gates :]
        work, scale = ctx.work, ctx.scale
        q, k, v, iq, ik, offset = (t.to(work) for t in (query, key, value, interaction_query, interaction_key, beta))
        batch, heads, n, _ = q.shape
        kv_heads, gate_scale = k.shape[1], 1.0 / math.sqrt(iq.shape[-1])
        d_output = d_output.to(work)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_iq, d_ik = torch.empty_like(iq), torch.zeros_like(ik)
        d_beta = torch.zeros((), dtype=work, device=q.device)
        # suffix[b, j]: what later blocks of queries want of log I of key j.
        suffix = torch.zeros(batch, n, dtype=work, device=q.device)
        for index in reversed(range(ctx.blocks)):
            start = index * BLOCK
            stop = min(n, start + BLOCK)
            rows = stop - start
            if gates:
                bias, slope = gates[2 * index : 2 * index + 2]
            else:
                log_gate, slope = _gates(iq, ik, offset, ctx.alpha, guard, end, carries[index], start, stop)
                bias = log_gate.cumsum(1).add_(carries[index][:, None])
            weights = kept[index] if kept else _weights(q, k, bias, scale, start, stop)
            grouped = d_output[:, :, start:stop].reshape(batch, kv_heads, -1, v.shape[-1])
            d_v[:, :, :stop] += weights.transpose(2, 3) @ grouped
            d_weights = grouped @ v[:, :, :stop].transpose(2, 3)
            # p (dp - sum p dp) in one pass.
            d_logits = torch._softmax_backward_data(d_weights, weights, -1, work)
            d_q[:, :, start:stop] = (d_logits @ k[:, :, :stop]).mul_(scale).view(batch, heads, rows, -1)
            grouped = q[:, :, start:stop].reshape(batch, kv_heads, -1, q.shape[-1])
            d_k[:, :, :stop] += (d_logits.transpose(2, 3) @ grouped).mul_(scale)
            # G[k, j] = dLoss/dlog I: all heads share one I.
            d_bias = d_logits.view(batch, heads, rows, stop).sum(1)
            d_bias += d_alive.to(work)[:, None, None] * torch.exp(_strictly_below(bias, start))
            # Reverse running sum over the block's queries: everything from this query on depends on this gate. Not the
            # total less a running sum: what that leaves of rounding is multiplied by 1/gate where a gate is almost 0.
            wanted = suffix[:, None, :stop] + d_bias.flip(1).cumsum(1).flip(1)
            d_x = slope * wanted
            suffix[:, :stop] = wanted[:, 0]
            d_iq[:, start:stop] = (d_x @ ik[:, :stop]) * gate_scale
            d_ik[:, :stop] += (d_x.transpose(1, 2) @ iq[:, start:stop]) * gate_scale
            d_beta += d_x.sum()
        inputs = (query, key, value, interaction_query, interaction_key, beta)
        gradients = (d_q, d_k, d_v, d_iq, d_ik, d_beta.view_as(beta))
        return *(g.to(t.dtype) for g, t in zip(gradients, inputs, strict=True)), None, None, None, None


def _gates(iq, ik, offset, alpha, guard, end, carry, start, stop) -> tuple[Tensor, Tensor]:
    """(ln g, d ln g/dx) of queries start..stop-1 for keys 0..stop-1, each (batch, rows, stop).

    Only gates that can still change something are solved: under the diagonal, not guarded, key not gone yet.
    """
    row = torch.arange(start, stop, device=iq.device)[None, :, None]
    ended = row >= end[:, None, :stop]
    x = torch.baddbmm(offset, iq[:, start:stop], ik[:, :stop].transpose(1, 2), alpha=1.0 / math.sqrt(iq.shape[-1]))
    active = (row >= guard[:, None, :stop]) & ~ended & (carry[:, None] > DEAD)
    if iq.device.type == "cpu":
        # Solving the few active gates is cheaper than all of them; on a GPU the count would cost a synchronisation.
        log_gate, slope = torch.zeros_like(x), torch.zeros_like(x)
        if alpha > 1.0:
            edge = 1.0 / (alpha - 1.0)
            log_gate.masked_fill_(active & (x <= -edge), LOG_ZERO)
            active &= (x < edge) & (x > -edge)
        solve = active.view(-1).nonzero().view(-1)
        solved_gate, solved_slope = log_alpha_sigmoid(x.view(-1).index_select(0, solve), alpha)
        log_gate.view(-1).index_copy_(0, solve, solved_gate)
        slope.view(-1).index_copy_(0, solve, solved_slope)
    else:
        log_gate, slope = (t.masked_fill(~active, 0.0) for t in log_alpha_sigmoid(x, alpha))
    return log_gate.masked_fill_(ended, LOG_ZERO), slope


def _strictly_below(bias: Tensor, start: int) -> Tensor:
    """log I with -inf on and above the diagonal: the pairs that sparsity counts."""
    row = torch.arange(start, start + bias.shape[1], device=bias.device)[:, None]
    return bias.masked_fill(torch.arange(bias.shape[2], device=bias.device) >= row, -torch.inf)


def _weights(q: Tensor, k: Tensor, bias: Tensor, scale: float, start: int, stop: int) -> Tensor:
    """softmax(q k^T scale + log I), causal: (batch, kv_heads, groups * rows, stop). The diagonal is always finite."""
    batch, heads, _, width = q.shape
    kv_heads, rows = k.shape[1], stop - start
    grouped = q[:, :, start:stop].reshape(batch, kv_heads, -1, width)
    logits = (grouped * scale) @ k[:, :, :stop].transpose(2, 3)
    row = torch.arange(start, stop, device=q.device)[:, None]
    bias = bias.masked_fill(torch.arange(stop, device=q.device) > row, -torch.inf)
    logits.view(batch, kv_heads, heads // kv_heads, rows, stop).add_(bias[:, None, None])
    return torch.softmax(logits, -1)


class _LogGate(torch.autograd.Function):
    """ln sigma_alpha with its derivative."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: float) -> Tensor:
        log_gate, slope = log_alpha_sigmoid(x, alpha)
        ctx.save_for_backward(slope)
        return log_gate

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None


def log_survival(
    interaction_query: Tensor, interaction_key: Tensor, beta: Tensor, alpha: float, guard: Tensor, end: Tensor
) -> Tensor:
    """log I as a tensor, (batch, n, n), 0 on and above the diagonal; arguments as kernels.log_survival."""
    work = torch.float64 if interaction_query.dtype == torch.float64 else torch.float32
    iq, ik, offset = (t.to(work) for t in (interaction_query, interaction_key, beta))
    x = iq @ ik.transpose(1, 2) / math.sqrt(iq.shape[-1]) + offset
    row = torch.arange(iq.shape[1], device=iq.device)[None, :, None]
    log_gate = torch.where(row >= guard[:, None, :], _LogGate.apply(x, alpha), 0.0)
    log_gate = torch.where((row >= end[:, None, :]) & (row > row.transpose(1, 2)), LOG_ZERO, log_gate)
    return log_gate.cumsum(1).clamp(min=LOG_ZERO)
