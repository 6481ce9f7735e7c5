"""What would BigBird's block pattern look at? First tokens, a window, and blocks drawn by lot (arXiv 2007.14062, 2).

In the paper every query has such a set of its own and nothing is ever freed: what one query passes over the next one
may see. Here the set of the first query behind the prompt holds for all that follow, and what lies outside it is freed.
Without drawn blocks it is Longformer's window with global tokens (arXiv 2004.05150, 3.1). No token's content counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.scorer import Scorer, Signals, hashed


@dataclass(frozen=True)
class BigBirdConfig(RankedConfig):
    """Any budget is shared out as the base model's (ITC) is: 2 parts first tokens, 3 the window, 3 drawn blocks. Where
    two of them meet, all three reach further."""

    policy: ClassVar[str] = "bigbird"
    first: int = 2
    """Parts of the budget for the first tokens."""
    window: int = 3
    """Parts for the last ones."""
    drawn: int = 3
    """Parts for blocks drawn by lot, the same ones for all rows of a length."""
    block: int = 64
    """Tokens of a drawn block."""
    seed: int = 0
    """Which blocks are drawn; each layer draws its own."""

    def __post_init__(self):
        super().__post_init__()
        parts = (self.first, self.window, self.drawn)
        if min(parts) < 0 or not any(parts) or self.block < 1:
            raise UserError(
                f"bigbird has first, window, drawn = {parts} and block={self.block}: give parts of 0 or more, one of "
                "them above 0, and a block of at least 1"
            )

    def scorer(self, layer: int, width: int) -> Scorer:
        return BigBirdScorer(self, self.seed + 7919 * layer)


class BigBirdScorer(Scorer):
    """How small a budget already reaches a key: from the front, from the back, or by its block's place in the draw."""

    def __init__(self, config: BigBirdConfig, seed: int):
        super().__init__()
        self.config, self.seed = config, seed

    def score(self, seen: Signals) -> Float[Tensor, "rows keys"]:
        # A row that has not begun stands at -1.
        block, now = self.config.block, seen.now.clamp(min=0)[:, None]
        # Elsewhere than at its keys a table may say anything.
        position = torch.minimum(seen.position.clamp(min=0), now)
        number = torch.arange(int(now.max()) // block + 1, device=now.device)
        lots = hashed(number, self.seed).masked_fill(number > now // block, torch.inf)
        drawn_before = lots.argsort(1).argsort(1).gather(1, position // block)
        reached = (
            (position, self.config.first),
            (now - position, self.config.window),
            (drawn_before * block + position % block, self.config.drawn),
        )
        needs = [(before + 1).double() / parts for before, parts in reached if parts]
        return -torch.stack(needs).amin(0)
