"""Does the length of a key say what it is worth? Keys of low norm stay (arXiv 2406.11430)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.scorer import Arrivals, Scorer
from ctxprune.precision import exactly


@dataclass(frozen=True)
class KeyNormConfig(RankedConfig):
    """The key's Euclidean norm, mean over KV heads. Its sign depends on the model: on some it is worse than chance."""

    policy: ClassVar[str] = "key_norm"
    low: bool = True
    """Keep low norms, as published; otherwise high ones."""

    def scorer(self, layer: int, width: int) -> Scorer:
        return KeyNormScorer(self.low, self.apart)


class KeyNormScorer(Scorer):
    """Known when the key comes."""

    def __init__(self, low: bool, apart: bool):
        super().__init__()
        self.low, self.apart = low, apart

    def own(self, new: Arrivals) -> Float[Tensor, "batch *kv_heads n"]:
        norm = exactly(new.keys).norm(dim=-1)
        norm = norm if self.apart else norm.mean(1)
        return -norm if self.low else norm
