"""Which keys may a query see before any gate has spoken?

Document ends, lifetimes and protected tokens, one integer each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ctxprune.policies.rule import FOREVER, Rule


@dataclass
class Layout:
    """Where documents lie in a batch of rows. All (batch, n).

    position: place of each token in its document; end: row at which the document of each key ends (n when it goes on);
    packed: whether any row holds more than one document or padding.
    """

    position: Int[Tensor, "batch n"]
    end: Int[Tensor, "batch n"]
    packed: bool


def layout(
    shape: Sequence[int],
    position_ids: Int[Tensor, "rows n"] | None,
    padding: Bool[Tensor, "batch n"] | None,
    device: torch.device,
) -> Layout:
    """Documents of a batch of shape (batch, n): a new one starts where position_ids do not rise by one, and wherever
    padding begins or ends.

    padding: True at real tokens. A padding token is a document of its own: no other token ever sees it.
    """
    batch, n = shape
    if position_ids is None:
        position = torch.arange(n, device=device).expand(batch, n)
    else:
        position = position_ids.to(device).expand(batch, n)
    cut = torch.zeros(batch, n, dtype=torch.bool, device=device)
    cut[:, 1:] = position[:, 1:] != position[:, :-1] + 1
    if padding is not None:
        real = padding.to(device=device, dtype=torch.bool)[:, -n:]
        cut[:, 1:] |= ~real[:, 1:] | ~real[:, :-1]
        # Models that are given no positions number padding too: a row's text begins at 0 all the same.
        first = position.gather(1, real.long().argmax(1, keepdim=True))
        position = torch.where(real[:, :1], position, (position - first).clamp(min=0))
    if not cut.any():
        return Layout(position, torch.full((batch, n), n, device=device), packed=False)
    # The end of key j's document is the first cut after j: a running minimum from the right.
    column = torch.arange(n, device=device)
    next_cut = torch.where(cut, column, n)
    following = torch.cat([next_cut[:, 1:], next_cut.new_full((batch, 1), n)], dim=1)
    return Layout(position, following.flip(1).cummin(1).values.flip(1), packed=True)


def lifetimes(
    position: Int[Tensor, "batch n"],
    rule: Rule,
    sinks: int,
    recent: int,
    sliding_window: int | None,
    pinned: Bool[Tensor, "batch n"] | None = None,
) -> Int[Tensor, "batch n"] | None:
    """How many queries see each key by position alone, itself included; None when every key lives for ever.

    sinks: first positions of a document that no rule drops; recent: queries after the key during which no rule drops
    it; pinned: keys that no rule drops; sliding_window: the model's own limit, which binds even them.
    """
    life = rule.lifetime(position)
    if life is not None:
        protected = position < sinks if pinned is None else (position < sinks) | pinned
        life = torch.where(protected, FOREVER, life.clamp(min=recent + 1))
    if sliding_window is not None:
        own = torch.full_like(position, sliding_window)
        life = own if life is None else torch.minimum(life, own)
    return life


def ends(plan: Layout, life: Int[Tensor, "batch n"] | None) -> Int[Tensor, "batch n"]:
    """First row that no longer sees each key by its document and position alone: at most the document's end.

    A key of the last document whose life outlasts the batch reads as n or more, so that a cache knows it survives.
    """
    if life is None:
        return plan.end
    n = plan.end.shape[1]
    column = torch.arange(n, device=plan.end.device)
    by_age = column + life
    return torch.where(plan.end >= n, by_age, torch.minimum(plan.end, by_age))


def guards(
    position: Int[Tensor, "batch n"], sinks: int, recent: int, pinned: Bool[Tensor, "batch n"] | None = None
) -> Int[Tensor, "batch n"] | None:
    """First row whose gate may drop each key; None when that is simply the next row."""
    if sinks == 0 and recent == 0 and pinned is None:
        return None
    column = torch.arange(position.shape[1], device=position.device)
    protected = position < sinks if pinned is None else (position < sinks) | pinned
    return torch.where(protected, FOREVER, column + 1 + recent)


def visible_pairs(end: Int[Tensor, "batch n"]) -> Int[Tensor, " batch"]:
    """Pairs (query, previous key) of the same document per row: what sparsity is a share of."""
    n = end.shape[1]
    column = torch.arange(n, device=end.device)
    return (end.clamp(max=n) - column - 1).sum(1)
