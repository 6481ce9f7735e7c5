"""Which tokens are still in the residual stream? A stream that gets shorter, and what each token in it was worth.

Survivors stand side by side in the order of their columns. A row that keeps fewer than the longest one is filled up on
the right with copies of its first survivor, which no query sees and whose outputs are thrown away.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ctxprune.policies.scorer import attention as probabilities
from ctxprune.precision import exact

NAME = "ctxprune-hidden"
"""The attn_implementation under which transformers finds `attention`."""
BLOCK = 64
"""Query rows whose probabilities exist at once: memory stays linear in the number of tokens, however many are asked."""


@dataclass
class Watch:
    """Handed to one layer's attention, which leaves in `received` what each token of the stream got from the asked
    queries. last: query rows asked of each row, 0 = all."""

    alive: Bool[Tensor, "batch tokens"]
    causal: bool
    last: int
    received: Float[Tensor, "batch tokens"] | None = None
    seconds: float = 0.0


@dataclass
class Stream:
    """One pass over a batch of n columns. column, alive: (batch, tokens), where each token of the stream stood, and
    whether it is one (a copy or padding is none); protected: (batch, n); length: tokens of each row, padding left out.
    """

    there: Bool[Tensor, "batch n"]
    protected: Bool[Tensor, "batch n"]
    causal: bool
    left: Float[Tensor, "batch n1 hidden"] | None = None
    """The state in which each token left the stream, (batch, n + 1, hidden); the last column is for what is no token.
    None before the first one leaves."""
    kept: list[Bool[Tensor, "batch n"]] = field(default_factory=list)
    """Tokens that entered each layer so far."""
    places: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    """(column, alive) of each layer so far; None where nothing had left yet."""
    watch: Watch | None = None
    """What the layer before the next drop was asked."""
    seconds: float = 0.0
    last_shown: tuple[Tensor | None, Tensor, Tensor | None] | None = None
    """A layer's mask, the columns then, and what of the mask concerned them."""

    def __post_init__(self):
        self.column = torch.arange(self.n, device=self.there.device).expand(self.there.shape)
        self.alive = self.there
        self.stays = self.there

    @property
    def n(self) -> int:
        return self.there.shape[1]

    @property
    def length(self) -> Int[Tensor, " batch"]:
        return self.there.sum(1)

    @property
    def shortened(self) -> bool:
        return self.left is not None

    def shorten(self, hidden: Tensor, stays: Tensor) -> Tensor:
        """Keep the tokens `stays` (batch, tokens) of hidden (batch, tokens, width); the others keep their state of
        now as their output. Returns the shorter hidden (batch, longest row, width)."""
        if torch.equal(stays, self.alive):
            return hidden
        self.left = self._written(hidden)
        count = stays.sum(1)
        slot = stays.long().argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
        alive = torch.arange(slot.shape[1], device=slot.device) < count[:, None]
        slot = torch.where(alive, slot, slot[:, :1])
        self.column, self.alive = self.column.gather(1, slot), alive
        gone = torch.zeros(len(alive), self.n + 1, dtype=torch.bool, device=alive.device)
        self.stays = gone.scatter(1, self._target(), True)[:, : self.n]
        return taken(hidden, slot)

    def restored(self, hidden: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch n hidden"]:
        """Every column's output: the last layer's for tokens still there, for others the state in which they left."""
        return self._written(hidden)[:, : self.n] if self.shortened else hidden

    def shown(self, mask: Tensor | None) -> Tensor | None:
        """Of a layer's attention mask (batch, 1, n, n) what concerns the stream, (batch, 1, tokens, tokens); None where
        the layer's own rule, causal or everything, is enough."""
        # Layers of one kind get the same mask: it is gathered once for all of them between two drops.
        if self.last_shown is None or self.last_shown[0] is not mask or self.last_shown[1] is not self.column:
            self.last_shown = (mask, self.column, self._shown(mask))
        return self.last_shown[2]

    def _shown(self, mask: Tensor | None) -> Tensor | None:
        if mask is not None:
            rows, keys = self.column[:, :, None], self.column[:, None, :]
            batch = torch.arange(len(self.column), device=self.column.device)[:, None, None]
            full = mask.expand(len(self.column), -1, self.n, self.n)
            return hidden_from_all(full[batch, :, rows, keys].permute(0, 3, 1, 2), self.alive)
        if bool(self.alive.all()):
            return None
        tokens = self.alive.shape[1]
        square = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=self.alive.device)
        return hidden_from_all(square.tril() if self.causal else square, self.alive)

    def _target(self) -> Tensor:
        """Where each token of the stream is written; what is no token goes to the column that nobody reads."""
        return self.column.masked_fill(~self.alive, self.n)

    def _written(self, hidden: Tensor) -> Tensor:
        if self.left is None:
            # Before anything left, padding included: all columns are there, in their order.
            return torch.cat([hidden, hidden[:, :1]], 1)
        return self.left.scatter(1, self._target()[:, :, None].expand_as(hidden), hidden)


def taken(states: Float[Tensor, "batch n width"], slot: Int[Tensor, "batch m"]) -> Float[Tensor, "batch m width"]:
    """The states at the given slots of each row."""
    return states.gather(1, slot[:, :, None].expand(-1, -1, states.shape[-1]))


def hidden_from_all(mask: Tensor, alive: Bool[Tensor, "batch keys"]) -> Tensor:
    """A boolean or additive mask (batch, heads, queries, keys) in which no query sees keys that are not alive."""
    seen = alive[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def tokens_there(mask: Tensor | None, hidden: Float[Tensor, "batch n width"]) -> Bool[Tensor, "batch n"]:
    """Which columns are no padding: transformers hands layers a mask in which padding is a key that even its own query
    does not see."""
    batch, n, _ = hidden.shape
    if mask is None:
        return torch.ones(batch, n, dtype=torch.bool, device=hidden.device)
    own = mask.expand(batch, -1, n, n)[:, 0].diagonal(dim1=1, dim2=2)
    return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2


def asked_rows(
    alive: Bool[Tensor, "batch tokens"], last: int, causal: bool
) -> tuple[Int[Tensor, "batch asked"], Bool[Tensor, "batch asked"]]:
    """Slots of the queries that are asked, and whether each exists (a short row has fewer).

    Causal: the last ones of each row, which see all of it. Otherwise the first (CLS) and others evenly spread. last:
    how many, 0 = all.
    """
    count = alive.sum(1, keepdim=True)
    asked = min(last, alive.shape[1]) if last else alive.shape[1]
    rank = torch.arange(asked, device=alive.device).expand(len(alive), -1)
    exists = rank < count
    if causal:
        rank = rank + (count - asked).clamp(min=0)
    else:
        rank = torch.where(count > asked, rank * count // asked, rank)
    order = alive.long().argsort(dim=1, descending=True, stable=True)
    return order.gather(1, rank), exists


def received(
    query: Float[Tensor, "batch heads tokens width"],
    key: Float[Tensor, "batch kv_heads tokens width"],
    mask: Tensor | None,
    watch: Watch,
    scale: float,
) -> Float[Tensor, "batch tokens"]:
    """Mean attention that each token gets from the asked queries that see it; mean over heads, 0 for what is no token.

    With all rows asked, the importance of LTP (arXiv 2107.00910) and, but for a constant, of PoWER-BERT (2001.08950);
    with the last one, of LazyLLM (2407.14057), with more of them SnapKV's (2404.14469) before pooling. Under a causal
    mask recent keys are seen by fewer of them, hence the mean over those that could; a key beyond a layer's sliding
    window gets 0.
    """
    slots, exists = asked_rows(watch.alive, watch.last, watch.causal)
    column = torch.arange(query.shape[2], device=query.device)
    total = torch.zeros(watch.alive.shape, dtype=exact(query.dtype), device=query.device)
    observers = torch.zeros_like(total)
    for slot, real in zip(slots.split(BLOCK, 1), exists.split(BLOCK, 1), strict=True):
        index = slot[:, None, :, None]
        asked = query.gather(2, index.expand(-1, query.shape[1], -1, query.shape[3]))
        seen = (watch.alive[:, None, :] & real[:, :, None])[:, None]
        if mask is not None:
            shown = mask.expand(len(slot), -1, len(column), len(column))[:, :1]
            shown = shown.gather(2, index.expand(-1, -1, -1, len(column)))
            seen = seen & (shown if shown.dtype == torch.bool else shown > torch.finfo(shown.dtype).min / 2)
        elif watch.causal:
            seen = seen & (column <= index)
        total += probabilities(asked, key, seen, scale).mean(1).sum(1)
        observers += seen[:, 0].sum(1)
    return total / observers.clamp(min=1)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    watch: Watch | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The attention function transformers calls: its own SDPA, beside which a few query rows are asked if a layer that
    drops tokens comes next."""
    if watch is not None:
        began = time.perf_counter()
        with torch.no_grad():
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            watch.received = received(query, key, attention_mask, watch, scale)
        watch.seconds = time.perf_counter() - began
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def register() -> None:
    """Make `attn_implementation="ctxprune-hidden"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
