"""How is attention under drop times run on any device? SDPA over blocks of queries and the keys they see."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ctxprune.kernels.hard_attention.patterns import Pattern

BLOCK = 256
"""Queries per call: bounds the boolean mask to (batch, 1, BLOCK, n)."""

WORTH_GATHERING = 0.7
"""Live keys are copied side by side when they are at most this share of the keys before them."""


def drop_time_attention(
    query: Tensor, key: Tensor, value: Tensor, drop_time: Tensor, scale: float, pattern: Pattern | None = None
) -> Tensor:
    """Arguments and result as kernels.drop_time_attention."""
    n = query.shape[2]
    groups = query.shape[1] // key.shape[1]
    drop_time = drop_time if drop_time.ndim == 3 else drop_time[:, None]
    column = torch.arange(n, device=query.device)
    blocks = []
    rows = BLOCK if pattern is None else pattern.block
    for start in range(0, n, rows):
        stop = min(n, start + rows)
        keys, values, times, place = key[:, :, :stop], value[:, :, :stop], drop_time[:, :, :stop], column[:stop]
        if pattern is not None:
            # What this block may not see is for it as good as gone.
            times = times.masked_fill(~pattern.allowed[start // rows, :stop], 0)
        # On a GPU the count would cost a synchronisation.
        if query.device.type == "cpu" and start > 0:
            live = times > start
            kept = int(live.sum(-1).max())
            if kept <= WORTH_GATHERING * stop:
                # Each row's live keys in order, then, up to the longest row's count, dead ones that the mask hides.
                place = torch.argsort(live.to(torch.uint8), dim=-1, descending=True, stable=True)[..., :kept]
                times = times.gather(-1, place)
                keys, values = (_gathered(tensor, place) for tensor in (keys, values))
        if groups > 1:
            keys, values = (t.repeat_interleave(groups, dim=1) for t in (keys, values))
            if times.shape[1] > 1:
                times, place = (t.repeat_interleave(groups, dim=1) if t.ndim == 3 else t for t in (times, place))
        row = column[start:stop, None]
        visible = (place[..., None, :] <= row) & (row < times[..., None, :])
        blocks.append(
            scaled_dot_product_attention(query[:, :, start:stop], keys, values, attn_mask=visible, scale=scale)
        )
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _gathered(tensor: Tensor, place: Tensor) -> Tensor:
    """The tokens of (batch, kv_heads, n, width) named by place (batch, 1 or kv_heads, kept)."""
    batch, kv_heads, _, width = tensor.shape
    return tensor.gather(2, place[..., None].expand(batch, kv_heads, -1, width))
