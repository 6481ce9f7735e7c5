"""Is there one threshold per layer below which a key is not worth keeping? Learned token pruning (LTP, arXiv
2107.00910)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctxprune.policies.budget import Budget
from ctxprune.policies.h2o import H2OScorer
from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.scorer import Scorer, Signals

START = 0.01
"""Threshold of every layer before it is learned (the published one of the last layer; there the others rise to it)."""


@dataclass(frozen=True)
class LTPConfig(RankedConfig):
    """Attention received, mean over heads and the queries that could see the key, less the layer's threshold. The
    published one counts all queries of an encoder; under a causal mask that would favour old keys. How much is kept
    follows the input; the teacher is ctxprune.teachers.soft_mask."""

    policy: ClassVar[str] = "ltp"
    budget: Budget = field(default_factory=lambda: Budget(threshold=0.0))
    """Keep what lies above the threshold; a number of keys ranks by the same scores."""

    def scorer(self, layer: int, width: int) -> Scorer:
        return LTPScorer(START)


class LTPScorer(H2OScorer):
    """Column means of the attention, less a learned threshold."""

    def __init__(self, start: float):
        super().__init__(normalised=True)
        self.threshold = nn.Parameter(torch.tensor(start))

    def score(self, seen: Signals) -> Float[Tensor, "rows keys"]:
        return super().score(seen) - self.threshold
