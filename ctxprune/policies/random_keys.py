"""Is a rule better than drawing lots? Keys go at random; with keep_prompt only written ones (arXiv 2609.03430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.scorer import Arrivals, Scorer, lots


@dataclass(frozen=True)
class RandomConfig(RankedConfig):
    """Every key draws a number when it comes."""

    policy: ClassVar[str] = "random"
    seed: int = 0
    """Which numbers are drawn. They depend on position, token, layer and head, so that any batch and chunk agree."""

    def scorer(self, layer: int, width: int) -> Scorer:
        return RandomScorer(self.seed + 7919 * layer, self.apart)


class RandomScorer(Scorer):
    """Higher is luckier."""

    def __init__(self, seed: int, apart: bool):
        super().__init__()
        self.seed, self.apart = seed, apart

    def own(self, new: Arrivals) -> Float[Tensor, "batch *kv_heads n"]:
        if not self.apart:
            return lots(new, self.seed)
        return torch.stack([lots(new, self.seed + 104_729 * head) for head in range(new.keys.shape[1])], 1)
