"""How much is each key worth? One number per key, higher = keep: all that a policy which ranks keys has to say.

What it may look at is in `Signals`, computed when it is asked for. Full attention probabilities are not among them:
they would cost more than dropping keys saves. A row is a sequence, or one KV head of one where heads decide apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ctxprune.precision import exactly


@dataclass
class Arrivals:
    """New tokens as a layer meets them: what a key is worth by itself can be said here, once.

    hidden: the layer's normalised input; ids: token ids, or None where only hidden states are known; position: true
    positions.
    """

    hidden: Float[Tensor, "batch n hidden"]
    ids: Int[Tensor, "batch n"] | None
    position: Int[Tensor, "batch n"]
    keys: Float[Tensor, "batch kv_heads n width"]
    values: Float[Tensor, "batch kv_heads n width"]


@dataclass
class Signals:
    """What is known of the keys of each row before its next query. Keys come in the order of their positions.

    alive: the keys in question; what stands elsewhere means nothing. now: position of the row's last query. queries:
    the last `window` ones before now, now included; query_position is negative where there was none. own: what `own`
    said when the key came; received: attention the key got so far, summed over queries, mean over heads, itself
    included; observers: how many queries could see it.
    """

    position: Int[Tensor, "rows keys"]
    alive: Bool[Tensor, "rows keys"]
    now: Int[Tensor, " rows"]
    keys: Float[Tensor, "rows kv_heads keys width"]
    values: Float[Tensor, "rows kv_heads keys width"]
    queries: Float[Tensor, "rows heads window asked_width"]
    query_position: Int[Tensor, "rows window"]
    own: Float[Tensor, "rows keys"]
    received: Float[Tensor, "rows keys"]
    scale: float

    @property
    def observers(self) -> Int[Tensor, "rows keys"]:
        return (self.now[:, None] - self.position + 1).clamp(min=1)

    def attention(self) -> Float[Tensor, "rows heads window keys"]:
        """Softmax of the last queries over the keys alive; 0 for queries that are not there."""
        there = self.query_position[:, :, None] >= self.position[:, None, :].clamp(min=0)
        seen = (self.alive[:, None, :] & there)[:, None]
        return attention(self.queries, self.keys, seen, self.scale)


def attention(query: Tensor, key: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Probabilities (rows, heads, queries, keys) over the keys that each query has seen, 0 for one that saw none."""
    rows, heads, n, width = query.shape
    grouped = exactly(query).reshape(rows, key.shape[1], -1, n, width)
    logits = (grouped @ exactly(key)[:, :, None].transpose(-1, -2)).reshape(rows, heads, n, -1) * scale
    return torch.softmax(logits.masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0)


class Scorer(nn.Module):
    """One layer's scorer. Set what it looks at; the rest need not be kept."""

    window: int = 0
    """Last queries it looks at."""
    accumulates: bool = False
    """Whether it wants to know the attention each key got (`received`)."""
    looks_at_keys: bool = False
    """Whether its score looks at keys or values themselves."""
    whole_prompt: bool = False
    """Whether its score needs the prompt's end: it cannot rank at every step."""

    @property
    def marks(self) -> bool:
        """Whether two numbers must be kept beside each key that may be ranked again."""
        return self.accumulates or type(self).own is not Scorer.own

    @property
    def at_once(self) -> bool:
        """Whether the score of a key is said when it comes, and stays."""
        return type(self).score is Scorer.score

    def own(self, new: Arrivals) -> Float[Tensor, "batch *kv_heads n"] | None:
        """What each new key is worth by itself; None: 0."""
        return None

    def score(self, seen: Signals) -> Float[Tensor, "rows keys"]:
        """Higher = keep. By default what `own` said."""
        return seen.own


def lots(new: Arrivals, seed: int) -> Float[Tensor, "batch n"]:
    """A number in [0, 1) for each new token, by its position and id: the same in any batch, chunk or order."""
    return hashed(new.position if new.ids is None else new.position * 1_000_003 + new.ids, seed)


def hashed(position: Int[Tensor, ...], seed: int) -> Float[Tensor, ...]:
    """Numbers in [0, 1) that depend on the position and the seed alone: the same in any batch, chunk or order."""
    mixed = (position.long() + 1) * 2654435761 + ((seed ^ seed >> 32) * 40503 & 0xFFFFFFFF)
    for shift, factor in ((16, 73244475), (15, 73244475)):
        mixed = ((mixed >> shift) ^ mixed) * factor & 0xFFFFFFFF
    return ((mixed >> 16) ^ mixed).double() / math.ldexp(1.0, 32)
