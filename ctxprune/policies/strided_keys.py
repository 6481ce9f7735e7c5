"""Is it enough to keep every so-many-th key? Positions spread evenly over the context, for any budget.

The lasting keys of the strided pattern (arXiv 1904.10509, 4.3: the last of each block), as a ranking: of a share of 1/2
every second key stays, of 1/4 every fourth, and in between as evenly as it can be. Unlike in `strided`, and in the
paper, all of the prompt is read densely, what is written later stays, and what is passed over is freed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.scorer import Arrivals, Scorer

_BITS = 31  # of a position; a double holds them all


@dataclass(frozen=True)
class StridedKeysConfig(RankedConfig):
    """By position alone, the same in every layer."""

    policy: ClassVar[str] = "strided_keys"

    def scorer(self, layer: int, width: int) -> Scorer:
        return StridedKeysScorer()


class StridedKeysScorer(Scorer):
    """Van der Corput's sequence (1935): the bits of position + 1 read backwards, negated. Numbers with many zeros at
    their end come first, and the first 1 / s of all are every s-th, for s a power of two."""

    def own(self, new: Arrivals) -> Float[Tensor, "batch n"]:
        left, backwards = new.position.long() + 1, torch.zeros_like(new.position, dtype=torch.double)
        for bit in range(_BITS):
            backwards += (left >> bit & 1).double() / 2 ** (bit + 1)
        return -backwards
