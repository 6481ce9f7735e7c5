"""What if nothing is dropped? The control every other rule is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn


@dataclass(frozen=True)
class DenseConfig:
    """Every previous token stays visible."""

    policy: ClassVar[str] = "dense"
    sinks: int = 0
    recent: int = 0

    def layer(self, index: int, width: int) -> DenseRule:
        return DenseRule()


class DenseRule(nn.Module):
    """No gate, no end of life."""

    gate = None

    def lifetime(self, position):
        return None
