"""What does each layer of a cache hold of a prompt whose tokens left on the way?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from ctxprune.hidden_pruning.stream import hidden_from_all


@dataclass(frozen=True)
class Prompt:
    """What each layer of a cache holds of a prompt of `columns`: (column, alive), each (batch, tokens); None: all.
    mark: the last layer's key of each row's last token, by which a row is known again; None where that has all."""

    batch: int
    columns: int
    places: list[tuple[Tensor, Tensor] | None]
    mark: Float[Tensor, "batch width"] | None

    @property
    def shortened(self) -> bool:
        return any(place is not None for place in self.places)

    def moved(self, cache: Cache) -> bool:
        """Whether the cache's rows changed places. Beams of one prompt do, and are equal but for rounding."""
        if self.mark is None or (place := self.places[-1]) is None:
            return False
        off = (mark(cache, place) - self.mark).abs().max()
        return bool(off > torch.finfo(self.mark.dtype).eps ** 0.5 * self.mark.abs().max())


def mark(cache: Cache, place: tuple[Tensor, Tensor]) -> Float[Tensor, "batch width"]:
    """The last layer's key (of its first head) of the last token that each row keeps there."""
    layer: Any = cache.layers[-1]  # of a DynamicCache: others are refused
    keys, last = layer.keys[:, 0], place[1].sum(1) - 1
    return keys[torch.arange(len(keys), device=keys.device), last]


def over(mask: Tensor | None, column: Int[Tensor, "batch keys"], alive: Bool[Tensor, "batch keys"], fed: int):
    """The mask (batch, 1, fed, all columns) of the keys held, or None where all `fed` queries see all of them."""
    if mask is None:
        # transformers leaves the mask out of a step of one token only, which sees all there is.
        assert fed == 1
        return None if bool(alive.all()) else alive[:, None, None]
    every = mask.expand(len(column), -1, -1, -1)
    held = every.gather(3, column[:, None, None].expand(-1, every.shape[1], every.shape[2], -1))
    return hidden_from_all(held, alive)
