"""What does a fixed strided pattern keep? A query's own block, and the last token of every earlier one.

The "fixed" pattern of sparse transformers (arXiv 1904.10509, section 4.3), the paper's second baseline. It is a rule of
drop times too: the last token of a block stays for ever, every other one dies with its block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.policies.rule import FOREVER, Rule


@dataclass(frozen=True)
class StridedConfig:
    """Block length per layer, and how many blocks share one lasting token."""

    policy: ClassVar[str] = "strided"
    blocks: tuple[int, ...]
    """Tokens per block, one number per layer."""
    every: tuple[int, ...]
    """The last token of every `every`-th block stays (1 is the published pattern), one number per layer."""
    sinks: int = 0
    """First tokens of each document that are never dropped."""
    recent: int = 0
    """Most recent tokens that are never dropped."""

    def __post_init__(self):
        if not self.blocks or min(self.blocks) < 1 or len(self.blocks) != len(self.every) or min(self.every) < 1:
            raise UserError(f"strided has blocks {self.blocks}, every {self.every}: give two equally long lists, >= 1")

    def rules(self, layers: int, width: int, kv_heads: int) -> list[Rule]:
        """One block length per layer; see ctxprune.policies."""
        if layers != len(self.blocks):
            raise UserError(f"strided has {len(self.blocks)} blocks, the model {layers} layers: give one per layer")
        return [StridedRule(block, every) for block, every in zip(self.blocks, self.every, strict=True)]


class StridedRule(Rule):
    """A key lives to the end of its block; the last of every `every`-th block lives for ever."""

    def __init__(self, block: int, every: int):
        super().__init__()
        self.block, self.every = block, every

    def lifetime(self, position: Int[Tensor, "batch n"]) -> Int[Tensor, "batch n"]:
        left = self.block - position % self.block
        lasting = (left == 1) & ((position // self.block + 1) % self.every == 0)
        return torch.where(lasting, FOREVER, left)
