"""How much does this input need? One of a few budgets, chosen per input and layer when its context has been read; which
keys stay is said by the attention they got."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ctxprune.errors import UserError
from ctxprune.policies.budget import Budget
from ctxprune.policies.h2o import H2OScorer
from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.scorer import Arrivals, Scorer, Signals


@dataclass(frozen=True)
class BanditConfig(RankedConfig):
    """Ranks as normalised H2O; a small network chooses the budget from what it counted in the context, and its length.
    Taught by reward: the teacher is ctxprune.teachers.bandit."""

    policy: ClassVar[str] = "bandit"
    arms: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    """The budgets to choose from, shares of the context, rising."""
    units: int = 32
    """Width of the networks' hidden layers."""
    budget: Budget = field(default_factory=lambda: Budget(threshold=0.0))
    """At a threshold of 0 the chosen share stays. A higher one takes the lowest of it away from every input, a lower
    one adds: it is a logarithm of attention beside the last key that the choice keeps."""

    def __post_init__(self):
        super().__post_init__()
        rising = all(low < high for low, high in pairwise(self.arms))
        if len(self.arms) < 2 or not rising or not self.arms[0] > 0.0 or not self.arms[-1] <= 1.0:
            raise UserError(f"bandit has arms={self.arms}: give at least 2 rising shares above 0 and at most 1")
        if self.units < 1:
            raise UserError(f"bandit has units={self.units}: give at least 1")
        if self.apart:
            raise UserError("bandit chooses one budget for all heads of a layer: leave apart out")

    def scorer(self, layer: int, width: int) -> Scorer:
        return BanditScorer(width, self.units, self.arms)


class BanditScorer(H2OScorer):
    """One layer's networks. `look` says of each token, by its hidden state, whether it counts; `choose` takes how many
    count and how many there are to preferences among the budgets. What is pooled is a sum over tokens (Deep Sets,
    arXiv 1703.06114), so that one number beside each key is all that is stored. usual: sum, its spread and logarithm
    of the length of the contexts that were met first: what `choose` sees is how far others are from these."""

    whole_prompt = True
    usual: Tensor

    def __init__(self, width: int, units: int, arms: tuple[float, ...]):
        super().__init__(normalised=True)
        self.arms = arms
        self.look = nn.Sequential(nn.Linear(width, units), nn.GELU(), nn.Linear(units, 1))
        self.choose = nn.Sequential(nn.Linear(2, units), nn.GELU(), nn.Linear(units, len(arms)))
        self.register_buffer("usual", torch.tensor([0.0, 1.0, 0.0]))

    def own(self, new: Arrivals) -> Float[Tensor, "batch n"]:
        return self.counts(new.hidden)

    def counts(self, hidden: Float[Tensor, "batch n width"]) -> Float[Tensor, "batch n"]:
        """How much each token counts, 0 to 1."""
        return self.look(hidden).squeeze(-1).sigmoid()

    def preferences(self, counted: Float[Tensor, " rows"], length: Int[Tensor, " rows"]) -> Float[Tensor, "rows arms"]:
        """Logits of the budgets, given the sum of what `counts` says and the tokens of each context."""
        usual = self.usual.to(counted)
        seen = torch.stack([(counted - usual[0]) / usual[1], length.to(counted).log() - usual[2]], -1)
        return self.choose(seen.to(self.usual.dtype))

    @torch.no_grad()
    def meet(self, hidden: Float[Tensor, "batch n width"]) -> None:
        """These contexts are what is usual."""
        counted = self.counts(hidden).sum(-1)
        found = (counted.mean(), counted.std().clamp(min=1e-6), torch.tensor(float(hidden.shape[1])).log())
        self.usual.copy_(torch.stack([number.to(self.usual) for number in found]))

    def keys(self, length: Int[Tensor, " rows"]) -> Int[Tensor, "rows arms"]:
        """How many keys each budget keeps of contexts of this length."""
        return torch.stack([Budget(share=arm).count(length, 0, 1) for arm in self.arms], -1)

    def score(self, seen: Signals) -> Float[Tensor, "rows keys"]:
        """Logarithm of the attention, less what the chosen budget's last key has. Preferences that are not decided give
        the mean of their budgets' last keys, so that a little more of one changes little."""
        logs = super().score(seen).clamp(min=1e-30).log()
        # A row whose context is not over has nothing alive here, and nobody asks what it would keep.
        length = seen.alive.sum(-1).clamp(min=1)
        counted = seen.own.masked_fill(~seen.alive, 0.0).sum(-1)
        liked = self.preferences(counted, length).to(logs.dtype).softmax(-1)
        return logs - (liked * last_kept(logs, seen.alive, self.keys(length))).sum(-1, keepdim=True)


def last_kept(
    logs: Float[Tensor, "rows keys"], alive: Bool[Tensor, "rows keys"], count: Int[Tensor, "rows arms"]
) -> Float[Tensor, "rows arms"]:
    """What lies between the `count`-th highest of each row's scores and the next; where there is no next, below."""
    highest = logs.masked_fill(~alive, -torch.inf).sort(-1, descending=True).values
    last = highest.gather(1, count - 1)
    following = torch.cat([highest, torch.full_like(highest[:, :1], -torch.inf)], 1).gather(1, count)
    return torch.where(following.isinf(), last - 1.0, 0.5 * (last + following))
