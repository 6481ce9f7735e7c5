"""Are rare tokens the ones that matter? By their frequency in the context, or in a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.scorer import Arrivals, Scorer, Signals


@dataclass(frozen=True)
class FrequencyConfig(RankedConfig):
    """Rare tokens stay: how often the token stands among the keys alive, or -log of its share of a corpus."""

    policy: ClassVar[str] = "frequency"
    counts: tuple[int, ...] = ()
    """How often each token id stands in a corpus; empty: count in the context itself."""

    def scorer(self, layer: int, width: int) -> Scorer:
        return CorpusScorer(self.counts) if self.counts else ContextScorer()


class ContextScorer(Scorer):
    """Counts equal tokens among the keys alive."""

    def own(self, new: Arrivals) -> Float[Tensor, "batch n"]:
        return _ids(new).double()

    def score(self, seen: Signals) -> Float[Tensor, "rows keys"]:
        # Equal tokens stand together in the sorted row: how many of them are alive is a difference of two sums.
        own = seen.own.masked_fill(~seen.alive, -1.0)  # what stands there means nothing, and may be no number
        order = own.argsort(dim=1, stable=True)
        token, alive = own.gather(1, order).contiguous(), seen.alive.gather(1, order).long()
        before = torch.cat([alive.new_zeros(len(alive), 1), alive.cumsum(1)], 1)
        first, behind = (torch.searchsorted(token, token, right=right) for right in (False, True))
        count = before.gather(1, behind) - before.gather(1, first)
        return torch.empty_like(token).scatter_(1, order, -count.to(token.dtype))


class CorpusScorer(Scorer):
    """Looks the token up."""

    def __init__(self, counts: tuple[int, ...]):
        super().__init__()
        share = torch.tensor(counts, dtype=torch.float64)
        self.rarity = -((share + 1) / (share.sum() + len(counts))).log()

    def own(self, new: Arrivals) -> Float[Tensor, "batch n"]:
        ids = _ids(new)
        if int(ids.max()) >= len(self.rarity):
            raise UserError(f"frequency has counts of {len(self.rarity)} tokens, the text has id {int(ids.max())}")
        return self.rarity.to(ids.device)[ids]


def _ids(new: Arrivals) -> Tensor:
    if new.ids is None:
        raise UserError("frequency needs token ids: call the model with input_ids, not with embeddings")
    return new.ids
