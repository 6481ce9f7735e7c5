"""How many keys may stay? A number or a share, the same everywhere or spread over layers and heads; or as many as the
scores ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.precision import exactly


@dataclass(frozen=True)
class Budget:
    """Give exactly one of tokens, share, mass and threshold. What is protected (sinks, recent and pinned tokens) counts
    as part of it and stays even where it is more."""

    tokens: int | None = None
    """Keys that stay per layer (and KV head, where heads decide apart)."""
    share: float | None = None
    """The same as a share of the prompt, or of the tokens so far, in (0, 1]; rounded up."""
    mass: float | None = None
    """The fewest keys whose scores sum to this share of all scores (top-p, as Twilight, arXiv 2502.02770), in (0, 1].
    For scores that are not negative."""
    threshold: float | None = None
    """Keys whose score is at least this (as LTP, arXiv 2107.00910)."""
    pyramid: float = 0.0
    """How much more than the mean the first layer keeps and the last one less, as a share of it, in (-1, 1): falls
    linearly with depth (as PyramidKV, arXiv 2406.02069), or rises; the mean stays. Of tokens and share."""
    head_floor: float = 1.0
    """Part of an equal share that every KV head surely keeps; the rest goes to whichever head scores highest (Ada-KV,
    arXiv 2407.11550, with 0.2). 1: all keep as many. Where heads decide apart, at the end of a prompt."""

    def __post_init__(self):
        given = [name for name in ("tokens", "share", "mass", "threshold") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(f"a budget has one of tokens, share, mass and threshold, this has {len(given)}: give one")
        for name in ("share", "mass", "threshold", "pyramid", "head_floor"):
            if not isinstance(getattr(self, name), int | float | None):
                raise UserError(f"budget {name} is {getattr(self, name)!r}: give a number")
        if not isinstance(self.tokens, int | None):
            raise UserError(f"budget tokens is {self.tokens!r}: give a whole number")
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"budget tokens is {self.tokens}: give at least 1")
        for name in ("share", "mass"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise UserError(f"budget {name} is {value}: give a share above 0 and at most 1")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UserError(f"budget threshold is {self.threshold}: give a finite number")
        if not -1.0 < self.pyramid < 1.0:
            raise UserError(f"budget pyramid is {self.pyramid}: give a value above -1 and below 1")
        if not 0.0 <= self.head_floor <= 1.0:
            raise UserError(f"budget head_floor is {self.head_floor}: give a value from 0 to 1")
        if self.pyramid and not self.counted:
            raise UserError("budget pyramid spreads a number of keys over layers: it goes with tokens or share")
        if self.head_floor < 1.0 and not self.counted:
            raise UserError("budget head_floor spreads a number of keys over heads: it goes with tokens or share")

    @property
    def counted(self) -> bool:
        """Whether the number of keys is known before the scores are."""
        return self.tokens is not None or self.share is not None

    def count(self, length: Int[Tensor, " rows"], layer: int, layers: int) -> Int[Tensor, " rows"]:
        """Keys that stay of `length` tokens in this layer: at least 1, at most all.

        The layers together keep exactly layers * the mean, whatever the pyramid: what one keeps above it, the layer as
        far from the other end keeps below it, so neither can go further than to all keys or to one (PyramidKV's code
        flattens its pyramid there too, instead of keeping less).
        """
        if self.tokens is not None:
            mean = length.clamp(max=self.tokens)
        else:
            assert self.share is not None
            # Rounded before it is rounded up: 0.1 of 30 tokens are 3, whatever binary fractions make of it.
            mean = (length.double() * self.share).mul(1e6).round().div(1e6).ceil().to(length.dtype)
            mean = torch.minimum(mean.clamp(min=1), length)
        place = layers - 1 - 2 * layer  # above 0 in the first half; its opposite is the mirrored layer's
        wanted = (mean.double() * abs(self.pyramid * place) / max(1, layers - 1)).round().to(length.dtype)
        moved = torch.minimum(wanted, torch.minimum(length - mean, (mean - 1).clamp(min=0)))
        return mean + moved if self.pyramid * place > 0 else mean - moved


def chosen(
    budget: Budget,
    score: Float[Tensor, "batch heads keys"],
    candidate: Bool[Tensor, "batch heads keys"],
    protected: Bool[Tensor, "batch heads keys"],
    length: Int[Tensor, " batch"],
    layer: int,
    layers: int,
) -> Bool[Tensor, "batch heads keys"]:
    """Which of the candidates stay at the end of a prompt of `length` tokens, keys in the order of their positions:
    those that are protected, then those of the highest score (of equal ones, the younger). At least one per head.

    Per sequence exactly heads * max(budget, protected) keys stay under tokens and share (fewer where there are fewer).
    """
    score = exactly(score)
    worth = score.masked_fill(protected, torch.inf).masked_fill(~candidate, -torch.inf)
    order = youngest_first(worth)
    place = torch.arange(score.shape[-1], device=score.device)
    if budget.counted:
        keep = budget.count(length, layer, layers)[:, None].expand(score.shape[:2])
        if budget.head_floor < 1.0:
            keep = _spread(worth, keep, budget.head_floor, protected)
        stays = place < keep[..., None]
    elif budget.mass is not None:
        mass = score.clamp(min=0).masked_fill(~candidate, 0.0).gather(-1, order)
        before = mass.cumsum(-1) - mass
        # Sums are compared with some room: in another order of additions the last key must not come back.
        stays = before < budget.mass * mass.sum(-1, keepdim=True) * (1 - 1e-6)
    else:
        assert budget.threshold is not None
        stays = (score >= budget.threshold).gather(-1, order)
    stays = stays | (place == 0)
    return (torch.zeros_like(candidate).scatter(-1, order, stays) | protected) & candidate


def youngest_first(worth: Float[Tensor, "*rows keys"]) -> Int[Tensor, "*rows keys"]:
    """Places of the keys from the highest worth to the lowest, of equal ones the younger (later) first."""
    return worth.shape[-1] - 1 - worth.flip(-1).argsort(dim=-1, descending=True, stable=True)


def _spread(worth: Tensor, keep: Tensor, floor: float, protected: Tensor) -> Tensor:
    """Keys per head, (batch, heads): a sure part each, the rest by the best scores of all heads together."""
    batch, heads, keys = worth.shape
    sure = torch.maximum((keep * floor).floor().long().clamp(min=1), protected.sum(-1))
    place = torch.arange(keys, device=worth.device)
    rank = torch.empty_like(worth, dtype=torch.long)
    rank.scatter_(-1, youngest_first(worth), place.expand_as(rank))
    contested = worth.masked_fill(rank < sure[..., None], -torch.inf).flatten(1)
    left = (keep.sum(1) - sure.sum(1)).clamp(min=0)
    order = youngest_first(contested)
    won = torch.zeros_like(contested, dtype=torch.bool)
    won.scatter_(1, order, torch.arange(heads * keys, device=worth.device) < left[:, None])
    won &= contested > -torch.inf
    return sure + won.view(batch, heads, keys).sum(-1)
