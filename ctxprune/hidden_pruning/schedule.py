"""Which share of the tokens enters each layer, and by which score? The settings of hidden-state pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ctxprune.errors import UserError
from ctxprune.policies.budget import Budget

SCORES = ("attention", "norm", "random")


@dataclass(frozen=True)
class HiddenPruningConfig:
    """Give one of keep and threshold, an entry per layer. What is protected stays even where it is more."""

    keep: tuple[float, ...] = ()
    """Share of each row's own tokens that enters each layer, rounded up: 1.0 first, never rising, in (0, 1]."""
    threshold: tuple[float, ...] = ()
    """Score that a token needs to enter each layer (as LTP); 0 first, and wherever nothing is dropped."""
    score: str = "attention"
    """attention: mean attention got in the layer before from the query rows asked; norm: length of the hidden state
    (after a LayerNorm, as in BERT, it says little); random: the same draw for a position in every layer and batch."""
    last: int = 32
    """Query rows asked: a decoder's last ones, an encoder's first and others evenly spread; 0 = all."""
    protect_first: int = 1
    """First tokens of each row that never leave (the sink; CLS, so encoders protect at least 1)."""
    protect_last: int = 1
    """Last tokens of each row that never leave (SEP; what follows is read off it, so decoders protect at least 1)."""
    seed: int = 0
    """Of the random score."""

    def __post_init__(self):
        if bool(self.keep) == bool(self.threshold):
            raise UserError("hidden pruning has one of keep and threshold, an entry per layer: give one of them")
        for value in self.keep:
            if not 0.0 < value <= 1.0:
                raise UserError(f"hidden pruning keep has {value}: give shares above 0 and at most 1")
        if self.keep and (self.keep[0] != 1.0 or list(self.keep) != sorted(self.keep, reverse=True)):
            raise UserError(f"hidden pruning keep is {self.keep}: begin with 1.0 and never rise")
        for value in self.threshold:
            if not (math.isfinite(value) and value >= 0.0):
                raise UserError(f"hidden pruning threshold has {value}: give finite numbers, 0 or more")
        if self.threshold and self.threshold[0] != 0.0:
            raise UserError(
                f"hidden pruning threshold begins with {self.threshold[0]}: the first layer takes all, give 0"
            )
        if self.score not in SCORES:
            raise UserError(f"hidden pruning score is {self.score!r}: give {', '.join(SCORES)}")
        for name in ("last", "protect_first", "protect_last", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"hidden pruning {name} is {getattr(self, name)}: give 0 or more")

    def drops_before(self, layer: int) -> bool:
        """Whether tokens may leave between the layer before and this one."""
        if layer == 0 or layer >= self.layers:
            return False
        return self.keep[layer] < self.keep[layer - 1] if self.keep else self.threshold[layer] > 0.0

    @property
    def layers(self) -> int:
        return len(self.keep or self.threshold)

    def budget(self, layer: int) -> Budget:
        """How many tokens enter the layer."""
        return Budget(share=self.keep[layer]) if self.keep else Budget(threshold=self.threshold[layer])
