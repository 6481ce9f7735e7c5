"""Can the model learn what it may forget? Dynamic context pruning (arXiv 2305.15805)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctxprune.errors import UserError
from ctxprune.gate import InteractionGate
from ctxprune.policies.rule import Rule


@dataclass(frozen=True)
class GateConfig:
    """Learned interaction gates in every layer."""

    policy: ClassVar[str] = "learned"
    rank: int = 64
    """Width r of the interaction queries and keys; it is cached beside keys and values, so small models want it
    small."""
    beta: float = 2.0
    """Initial offset of the gate logits: higher keeps more at the start."""
    propagate_in_depth: bool = False
    """A key dropped in one layer is gone in every deeper one."""
    sinks: int = 0
    """First tokens of each document that are never dropped."""
    recent: int = 0
    """Most recent tokens that are never dropped."""

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"rank is {self.rank}: give at least 1")

    def rules(self, layers: int, width: int, kv_heads: int) -> list[Rule]:
        """One gate per layer, freshly initialised; see ctxprune.policies."""
        return [Rule(InteractionGate(width, self.rank, self.beta)) for _ in range(layers)]
