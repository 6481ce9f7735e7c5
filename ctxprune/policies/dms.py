"""Can a KV head tell from a token alone that it will not be needed for long? Dynamic memory sparsification (DMS, arXiv
2506.05345): it decides when the key comes, and the key goes once `recent` later tokens have seen it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctxprune.policies.budget import Budget
from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.rule import Ranking, Rule
from ctxprune.policies.scorer import Arrivals, Scorer

KEEP = 5.0
"""Logit of keeping at the start, for every token: the paper's -5 for evicting (section 3.2)."""


@dataclass(frozen=True)
class DMSConfig(RankedConfig):
    """Delayed eviction. How much is kept follows the input, head by head; the teacher is ctxprune.teachers.dms. With
    when=prompt, or a number of keys as the budget, the same scores rank."""

    policy: ClassVar[str] = "dms"
    when: str = "step"
    apart: bool = True
    budget: Budget = field(default_factory=lambda: Budget(threshold=0.0))
    """Keep what is rather kept than evicted."""
    recent: int = 256
    """The delay: later tokens that still see a key whose head has decided against it (256 as published)."""

    def scorer(self, layer: int, width: int) -> Scorer:
        return DMSScorer(width, 1)

    def rules(self, layers: int, width: int, kv_heads: int) -> list[Rule]:
        """One decision per KV head, or one per token where heads do not decide apart; see ctxprune.policies."""
        heads = kv_heads if self.apart else 1
        return [Rule(ranking=Ranking(DMSScorer(width, heads), self, layer, layers)) for layer in range(layers)]


class DMSScorer(Scorer):
    """One layer's decisions: the logit of keeping a token in each head, linear in its hidden state."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.keep = nn.Linear(width, heads)
        with torch.no_grad():
            self.keep.weight.zero_()
            self.keep.bias.fill_(KEEP)

    def forward(self, hidden: Float[Tensor, "batch n width"]) -> Float[Tensor, "batch heads n"]:
        """Logits of keeping."""
        return self.keep(hidden).transpose(1, 2)

    def own(self, new: Arrivals) -> Float[Tensor, "batch heads n"]:
        return self(new.hidden)
