"""How is attention under drop times run on any device? SDPA with the visibility of one block of queries at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BLOCK = 1024
"""Queries per call: bounds the boolean mask to (batch, 1, BLOCK, n)."""


def drop_time_attention(query: Tensor, key: Tensor, value: Tensor, drop_time: Tensor, scale: float) -> Tensor:
    """Arguments and result as kernels.drop_time_attention."""
    n = query.shape[2]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    drop_time = drop_time.repeat_interleave(groups, dim=1) if drop_time.ndim == 3 else drop_time[:, None]
    column = torch.arange(n, device=query.device)
    blocks = []
    for start in range(0, n, BLOCK):
        stop = min(n, start + BLOCK)
        row = column[start:stop, None]
        visible = (column[:stop] <= row) & (row < drop_time[:, :, None, :stop])
        blocks.append(
            scaled_dot_product_attention(
                query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], attn_mask=visible, scale=scale
            )
        )
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
