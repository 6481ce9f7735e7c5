"""What did the end of the prompt look at? Attention of its last queries, smoothed over neighbours (SnapKV, arXiv
2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool1d

from ctxprune.errors import UserError
from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.scorer import Scorer, Signals


@dataclass(frozen=True)
class SnapKVConfig(RankedConfig):
    """Attention of the last `window` queries, mean over them and over heads. With budget.pyramid it is PyramidKV (arXiv
    2406.02069), with apart and budget.head_floor Ada-KV (arXiv 2407.11550). The paper always keeps the window: that is
    recent=window; by default its keys compete, all but the last `recent`."""

    policy: ClassVar[str] = "snapkv"
    window: int = 32
    """Queries at the prompt's end that are asked."""
    pool: int = 7
    """Neighbouring keys over which scores are averaged, odd; 1: none. When ranking at every step none are."""
    normalised: bool = False
    """Divide by the queries that could see a key, not by all of the window: its own keys were seen by few."""

    def __post_init__(self):
        super().__post_init__()
        if self.window < 1 or self.pool < 1 or self.pool % 2 == 0:
            raise UserError(f"snapkv has window={self.window}, pool={self.pool}: give 1 or more, and an odd pool")

    def scorer(self, layer: int, width: int) -> Scorer:
        return SnapKVScorer(self.window, self.pool if self.when == "prompt" else 1, self.normalised)


class SnapKVScorer(Scorer):
    """Some rows of the attention, pooled."""

    looks_at_keys = True

    def __init__(self, window: int, pool: int, normalised: bool):
        super().__init__()
        self.window, self.pool, self.normalised = window, pool, normalised

    def score(self, seen: Signals) -> Float[Tensor, "rows keys"]:
        least = seen.position[:, None] if self.normalised else torch.zeros_like(seen.position[:, None])
        could = (seen.query_position[:, :, None] >= least).sum(1).clamp(min=1)
        asked = seen.attention().mean(1).sum(1) / could
        if self.pool == 1:
            return asked
        # Neighbours by position, whatever lies between them in the table; what is not there counts as 0.
        order = seen.position.masked_fill(~seen.alive, torch.iinfo(seen.position.dtype).max).argsort(dim=1)
        asked = asked.masked_fill(~seen.alive, 0.0).gather(1, order)
        pooled = avg_pool1d(asked[:, None], self.pool, 1, self.pool // 2).squeeze(1)
        return torch.empty_like(pooled).scatter_(1, order, pooled)
