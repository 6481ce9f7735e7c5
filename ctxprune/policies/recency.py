"""Are the newest tokens enough? They stay, with the first ones (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.scorer import Arrivals, Scorer


@dataclass(frozen=True)
class RecencyConfig(RankedConfig):
    """Younger is worth more: a window whose width is what the budget leaves beside the sinks."""

    policy: ClassVar[str] = "recency"

    def scorer(self, layer: int, width: int) -> Scorer:
        return RecencyScorer()


class RecencyScorer(Scorer):
    """The position itself."""

    def own(self, new: Arrivals) -> Float[Tensor, "batch n"]:
        return new.position.double()
