"""Do keys that got much attention so far go on to matter? Heavy hitters (H2O, arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.scorer import Scorer, Signals


@dataclass(frozen=True)
class H2OConfig(RankedConfig):
    """Attention received, summed over all queries so far. In the paper half of the budget is the most recent keys, and
    the sum is plain: that is recent=K/2 of K keys, normalised=False."""

    policy: ClassVar[str] = "h2o"
    normalised: bool = True
    """Divide by the number of queries that could see the key. Under a causal mask the plain sum favours old keys; that
    is the published sum."""

    def scorer(self, layer: int, width: int) -> Scorer:
        return H2OScorer(self.normalised)


class H2OScorer(Scorer):
    """Column sums of the attention."""

    accumulates = True
    looks_at_keys = True

    def __init__(self, normalised: bool):
        super().__init__()
        self.normalised = normalised

    def score(self, seen: Signals) -> Float[Tensor, "rows keys"]:
        return seen.received / seen.observers if self.normalised else seen.received
