"""Which keys may a query see whatever has been dropped? Patterns that come back to a key, and so free no memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor


class Pattern(NamedTuple):
    """Keys that each block of queries may see, beside what causality and drop times say.

    Unlike a drop time it may hide a key from one block and show it to the next. allowed[i, j] is about the queries
    i block to (i + 1) block - 1; every query is allowed its own key.
    """

    allowed: Bool[Tensor, "row_blocks n"]
    block: int

    def to(self, device: torch.device | str) -> Pattern:
        """The same on another device."""
        return Pattern(self.allowed.to(device), self.block)


def strided(n: int, block: int, stride: int, window: int = 1) -> Pattern:
    """The last of every `stride` keys, and the last `window` blocks up to a query's own (arXiv 1904.10509, by blocks).

    Raises ValueError unless all four are at least 1.
    """
    _at_least_one(n=n, block=block, stride=stride, window=window)
    return Pattern(_recent(n, block, window) | (torch.arange(n) % stride == stride - 1), block)


def blocks(n: int, block: int, window: int = 1, sinks: int = 0, scattered: int = 0, seed: int = 0) -> Pattern:
    """The first `sinks` keys, the last `window` blocks, and `scattered` earlier blocks drawn for each block of queries:
    Longformer (arXiv 2004.05150) with scattered = 0, else BigBird (arXiv 2007.14062).

    Raises ValueError unless n, block and window are at least 1 and the others at least 0.
    """
    _at_least_one(n=n, block=block, window=window, sinks=sinks + 1, scattered=scattered + 1)
    allowed = _recent(n, block, window) | (torch.arange(n) < sinks)
    generator = torch.Generator().manual_seed(seed)
    for row in range(len(allowed)):
        for drawn in torch.randperm(max(0, row - window + 1), generator=generator)[:scattered].tolist():
            allowed[row, drawn * block : (drawn + 1) * block] = True
    return Pattern(allowed, block)


def _recent(n: int, block: int, window: int) -> Tensor:
    """Own block and the ones before it, `window` in all."""
    row, own = torch.arange(-(-n // block))[:, None], torch.arange(n) // block
    return (own <= row) & (own > row - window)


def _at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            least = 0 if name in ("sinks", "scattered") else 1
            raise ValueError(f"{name} is {size - 1 + least}; accepted values are {least} and more")
