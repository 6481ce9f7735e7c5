"""Are unusual keys the ones to keep? Those least like the mean key stay (KeyDiff, arXiv 2504.15364)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.scorer import Scorer, Signals
from ctxprune.precision import exactly


@dataclass(frozen=True)
class KeyDiffConfig(RankedConfig):
    """Cosine similarity to the mean of the normalised keys alive, negated, mean over KV heads. Needs no queries."""

    policy: ClassVar[str] = "keydiff"

    def scorer(self, layer: int, width: int) -> Scorer:
        return KeyDiffScorer()


class KeyDiffScorer(Scorer):
    """Geometry of the keys alone."""

    looks_at_keys = True

    def score(self, seen: Signals) -> Float[Tensor, "rows keys"]:
        alive, keys = seen.alive[:, None, :, None], exactly(seen.keys)
        mean = normalize(keys, dim=-1).masked_fill(~alive, 0.0).sum(2, keepdim=True)
        return -cosine_similarity(keys, mean, dim=-1).mean(1)
