"""What do the layers know of the tokens of one call?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Bool, Int
from torch import Tensor


@dataclass
class Arrival:
    """What the wrapper decided about the tokens of a first pass, until the layer's keys and values arrive.

    step: (batch, n) position of each token that is to be stored, negative for the others; guard, drop_time: as
    kernels.extend_attention takes them.
    """

    interaction: Tensor | None
    step: Int[Tensor, "batch n"]
    guard: Int[Tensor, "batch n"]
    drop_time: Int[Tensor, "batch n"]


@dataclass
class NewTokens:
    """What the layers share of the tokens of a call. All (batch, n), but length (batch,).

    position: true positions; real: False at padding, None without any; step: position, -1 at padding; guard: first step
    whose gate may drop each; never: drop times of tokens that nothing drops; pinned: which no rule drops; length:
    positions seen after the call.
    """

    position: Int[Tensor, "batch n"]
    real: Bool[Tensor, "batch n"] | None
    step: Int[Tensor, "batch n"]
    guard: Int[Tensor, "batch n"]
    never: Int[Tensor, "batch n"]
    pinned: Bool[Tensor, "batch n"] | None
    length: Int[Tensor, " batch"]

    @cached_property
    def single(self) -> tuple[Tensor, Tensor, Tensor]:
        """step, guard and never of each row's only token: (batch,)."""
        return self.step[:, 0], self.guard[:, 0], self.never[:, 0]
