"""What if nothing is dropped? The control every other policy is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctxprune.policies.rule import Rule


@dataclass(frozen=True)
class DenseConfig:
    """Every previous token stays visible."""

    policy: ClassVar[str] = "dense"
    sinks: int = 0
    recent: int = 0

    def rules(self, layers: int, width: int, kv_heads: int) -> list[Rule]:
        """One rule per layer; see ctxprune.policies."""
        return [Rule() for _ in range(layers)]
