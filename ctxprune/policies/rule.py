"""What does a layer ask of its policy? Two things, whatever the policy: a learned gate, and how long a key lives."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor, nn

from ctxprune.gate import InteractionGate

FOREVER = 1 << 30
"""A lifetime or drop time no sequence reaches; sums of two still fit in 32 bits."""


class Rule(nn.Module):
    """One layer's rule; as it stands it drops nothing.

    gate: the learned gate that later queries drop keys by, or None.
    """

    gate: InteractionGate | None

    def __init__(self, gate: InteractionGate | None = None):
        super().__init__()
        self.gate = gate

    def lifetime(self, position: Int[Tensor, "batch n"]) -> Int[Tensor, "batch n"] | None:
        """How many queries see a key by its position alone, itself included; None: for ever."""
        return None
