"""What if the scores come from outside? The truth of a task (an oracle), gradients of the prompt, anything at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.scorer import Arrivals, Scorer


@dataclass(frozen=True)
class GivenConfig(RankedConfig):
    """Scores by layer, row and position that are handed over with `ctxprune.given_scores.given(model, scores)`."""

    policy: ClassVar[str] = "given"

    def scorer(self, layer: int, width: int) -> Scorer:
        return GivenScorer()


class GivenScorer(Scorer):
    """Looks up what it was given: (batch, positions)."""

    def __init__(self):
        super().__init__()
        self.table: Tensor | None = None

    def own(self, new: Arrivals) -> Float[Tensor, "batch n"]:
        if self.table is None or len(self.table) != len(new.position):
            there = "none" if self.table is None else f"those of {len(self.table)} rows"
            raise UserError(f"given ranks by scores that are handed over, there are {there}: hand over the batch's own")
        place = new.position.clamp(max=self.table.shape[1] - 1)
        # Tokens behind the scores are worth more than any: they were written later.
        behind = new.position >= self.table.shape[1]
        return self.table.to(place.device).gather(1, place).masked_fill(behind, torch.inf)
