"""What does a plain window keep? Each query sees the last `width` tokens, itself included (local attention)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.policies.rule import Rule


@dataclass(frozen=True)
class WindowConfig:
    """One window width per layer, so that a budget is met more finely than one token."""

    policy: ClassVar[str] = "window"
    widths: tuple[int, ...]
    """Tokens each query sees, itself included, one number per layer."""
    sinks: int = 0
    """First tokens of each document that are never dropped."""
    recent: int = 0
    """Most recent tokens that are never dropped."""

    def __post_init__(self):
        if not self.widths or min(self.widths) < 1:
            raise UserError(f"window widths are {self.widths}: give one number of at least 1 per layer")

    def rules(self, layers: int, width: int, kv_heads: int) -> list[Rule]:
        """One width per layer; see ctxprune.policies."""
        if layers != len(self.widths):
            raise UserError(f"window has {len(self.widths)} widths, the model {layers} layers: give one per layer")
        return [WindowRule(tokens) for tokens in self.widths]


class WindowRule(Rule):
    """A key lives for `width` queries."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def lifetime(self, position: Int[Tensor, "batch n"]) -> Int[Tensor, "batch n"]:
        return torch.full_like(position, self.width)
