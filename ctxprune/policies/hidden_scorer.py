"""Can a key's worth be read off the token's hidden state? A small network says so when the key comes: no attention, no
gradient, nothing to keep but one number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctxprune.errors import UserError
from ctxprune.policies.budget import Budget
from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.scorer import Arrivals, Scorer, lots


@dataclass(frozen=True)
class HiddenScorerConfig(RankedConfig):
    """Base of the policies that learn such a network; they differ in who teaches it (ctxprune.teachers)."""

    units: int = 32
    """Width of the network's hidden layer."""

    def __post_init__(self):
        super().__post_init__()
        if self.units < 1:
            raise UserError(f"{self.policy} has units={self.units}: give at least 1")
        if self.apart:
            raise UserError(f"{self.policy} gives a token one score for all heads: leave apart out")

    def scorer(self, layer: int, width: int) -> Scorer:
        return HiddenScorer(width, self.units)


@dataclass(frozen=True)
class FutureConfig(HiddenScorerConfig):
    """Taught by the attention that keys are going to get: what KVP (arXiv 2602.10238) rewards its agents for, learned
    as KVzap learns, from hidden states and without reward, one score for all heads. The teacher is
    ctxprune.teachers.future_attention."""

    policy: ClassVar[str] = "future"


@dataclass(frozen=True)
class DistilledConfig(HiddenScorerConfig):
    """Taught by gradients (as AdapLeR, arXiv 2203.08991): the teacher is ctxprune.teachers.edge_gradient."""

    policy: ClassVar[str] = "distilled"


@dataclass(frozen=True)
class AgentConfig(HiddenScorerConfig):
    """Taught by reward (as TR-BERT, arXiv 2105.11618): an agent keeps or drops each token, its score is the logit of
    keeping; the teacher is ctxprune.teachers.reward. How much is kept follows the input."""

    policy: ClassVar[str] = "agent"
    blind: bool = False
    """See no features: a control, which can learn how much each layer should keep but not what. It keeps by lot."""
    budget: Budget = field(default_factory=lambda: Budget(threshold=0.0))
    """Keep what the agent would rather keep than drop; a number of keys ranks by the same logits."""

    def scorer(self, layer: int, width: int) -> Scorer:
        return BlindScorer(width, self.units, layer) if self.blind else HiddenScorer(width, self.units)


class HiddenScorer(Scorer):
    """One layer's network; a fresh one keeps every token with a probability of sigmoid(KEEP)."""

    def __init__(self, width: int, units: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, units), nn.Linear(units, 1)
        with torch.no_grad():
            self.outer.bias.fill_(KEEP)

    def forward(self, hidden: Float[Tensor, "*batch n width"]) -> Float[Tensor, "*batch n"]:
        """Scores of tokens."""
        return self.outer(nn.functional.gelu(self.inner(hidden))).squeeze(-1)

    def own(self, new: Arrivals) -> Float[Tensor, "batch n"]:
        # Like tokens score alike in the first layer but for rounding, which may depend on how many are scored together.
        # In float64 there is room to round that away; elsewhere who of them stays may depend on it.
        said = self(new.hidden)
        return said.float().to(said.dtype)


class BlindScorer(HiddenScorer):
    """A network that is shown nothing: one number per layer. What stays is drawn, with the odds that it gives."""

    def __init__(self, width: int, units: int, layer: int):
        super().__init__(width, units)
        self.layer = layer

    def forward(self, hidden: Float[Tensor, "*batch n width"]) -> Float[Tensor, "*batch n"]:
        return super().forward(torch.zeros_like(hidden))

    def own(self, new: Arrivals) -> Float[Tensor, "batch n"]:
        lot = lots(new, 7919 * self.layer + 1).clamp(1e-6, 1 - 1e-6)
        # A logistic number: above -x with the probability sigmoid(x).
        return self(new.hidden) + (lot / (1 - lot)).log().to(new.hidden.dtype)


KEEP = 2.0
"""Logit of keeping at the start."""
