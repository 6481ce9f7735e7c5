"""Does the last query know best? Keys it attends to least go (TOVA, arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.scorer import Scorer, Signals


@dataclass(frozen=True)
class TovaConfig(RankedConfig):
    """Attention of the last query, mean over heads. The paper protects nothing: that is sinks=0, recent=0."""

    policy: ClassVar[str] = "tova"
    when: str = "step"
    """As published: before every token."""

    def scorer(self, layer: int, width: int) -> Scorer:
        return TovaScorer()


class TovaScorer(Scorer):
    """One row of the attention."""

    window = 1
    looks_at_keys = True

    def score(self, seen: Signals) -> Float[Tensor, "rows keys"]:
        return seen.attention().mean(1)[:, -1]
