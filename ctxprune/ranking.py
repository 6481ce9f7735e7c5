"""When does a key lose its place? The drop times of a policy that ranks, from what its scorer says.

One function for whole rows, chunks and single steps: what is stored comes first in the table, new tokens follow. Times
are of one clock: columns for whole rows (where packed documents start anew), positions for a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxprune.policies.budget import chosen, youngest_first
from ctxprune.policies.rule import Ranking
from ctxprune.policies.scorer import Signals, attention

AT_ONCE = 256
"""Queries whose attention is computed together: their probabilities are all that is ever held of it."""


@dataclass
class Keys:
    """Keys of each row in the order of their positions. Rows are sequences, or KV heads of sequences, those of one
    sequence together.

    position: -1 where nothing is. alive: those that live. end: first time that no longer sees each key whatever is
    ranked. protected: keys that no rule drops. own, received: see Signals.
    """

    position: Int[Tensor, "rows keys"]
    alive: Bool[Tensor, "rows keys"]
    end: Int[Tensor, "rows keys"]
    protected: Bool[Tensor, "rows keys"]
    keys: Float[Tensor, "rows kv_heads keys width"]
    values: Float[Tensor, "rows kv_heads keys width"]
    own: Float[Tensor, "rows keys"]
    received: Float[Tensor, "rows keys"]


@dataclass
class Table(Keys):
    """Stored keys, then n new ones.

    alive: False for new ones; it and received are changed in place. queries, query_position: (window + n) last ones,
    stored, then new. clock: time of each new token, negative where there is none.
    """

    queries: Float[Tensor, "rows heads asked asked_width"]
    query_position: Int[Tensor, "rows asked"]
    clock: Int[Tensor, "rows n"]
    heads: int
    """KV heads that decide apart: rows per sequence."""
    scale: float

    @property
    def stored(self) -> int:
        """Keys that were there before."""
        return self.position.shape[1] - self.clock.shape[1]

    @property
    def new(self) -> Int[Tensor, "rows n"]:
        """Positions of the new tokens."""
        return self.position[:, self.stored :]

    def before(self, column: Int[Tensor, " rows"], window: int) -> tuple[Tensor, Tensor]:
        """The last `window` real queries before each row's new token `column`, and their positions; -1 for none, and
        for those of another document than the last of them: behind a prompt may be padding, or the next document."""
        n, width = self.clock.shape[1], self.queries.shape[-1]
        old = self.query_position.shape[1] - n
        place = torch.arange(old + n, device=column.device).expand(len(column), -1)
        last = (column - 1).clamp(min=0)
        first = last - self.new.gather(1, last[:, None]).squeeze(1).clamp(min=0)
        earlier = (place < column[:, None] + old) & (place - old >= first[:, None])
        real = earlier & (self.query_position >= 0)
        # Real ones last, in their order; the sort is stable.
        taken = real.long().argsort(dim=1, stable=True)[:, max(0, old + n - window) :]
        position = self.query_position.masked_fill(~real, -1).gather(1, taken)
        shape = (-1, self.queries.shape[1], -1, width)
        return self.queries.gather(2, taken[:, None, :, None].expand(shape)), position

    def signals(self, ranking: Ranking, now: Tensor, column: Tensor, alive: Tensor) -> Signals:
        """What the scorer may look at before each row's new token `column`."""
        queries, query_position = self.before(column, ranking.scorer.window)
        return Signals(
            self.position, alive, now, self.keys, self.values, queries, query_position, self.own, self.received,
            self.scale,
        )  # fmt: skip


def by_step(ranking: Ranking, table: Table, prompt: Int[Tensor, " rows"] | None) -> Int[Tensor, "rows keys"]:
    """Drop times where the budget holds before every token: the lowest go until it fits, of equal ones the older.

    prompt: positions of each row's prompt, for keep_prompt. What is not dropped keeps its `end`.
    """
    drop, config, n = table.end.clone(), ranking.config, table.clock.shape[1]
    for t in range(n):
        column, now = table.stored + t, table.clock[:, t]
        step, real = table.position[:, column], now >= 0
        table.alive &= drop > now[:, None]
        most = _most(ranking, step + 1, prompt)
        excess = (table.alive.sum(1) + 1 - most).masked_fill(~real, 0)
        if bool((excess > 0).any()):
            where = torch.full_like(now, t)
            score = ranking.scorer.score(table.signals(ranking, step - 1, where, table.alive))
            candidate = table.alive & ~table.protected & (table.position < (step - config.recent)[:, None])
            if config.keep_prompt and prompt is not None:
                candidate &= table.position >= prompt[:, None]
            worth = score.masked_fill(~candidate, torch.inf)
            order = youngest_first(worth).flip(-1)
            place = torch.arange(order.shape[1], device=order.device)
            goes = torch.zeros_like(candidate).scatter(1, order, place < excess[:, None]) & candidate
            drop = torch.where(goes, now[:, None].to(drop.dtype), drop)
            table.alive &= ~goes
        table.alive[:, column] |= real
        if ranking.scorer.accumulates:
            queries = table.queries[:, :, -n:]
            seen = (table.alive & real[:, None])[:, None, None]
            table.received += attention(queries[:, :, t : t + 1], table.keys, seen, table.scale).mean(1).squeeze(1)
    return drop


def on_arrival(ranking: Ranking, table: Table) -> Int[Tensor, "rows keys"]:
    """Drop times where a key's own score decides when it comes: below the threshold it goes once `recent` later tokens
    have seen it (delayed eviction, DMS, arXiv 2506.05345, section 3.2). Stored keys keep theirs."""
    config, stored = ranking.config, table.stored
    assert config.budget.threshold is not None
    goes = (table.clock >= 0) & ~table.protected[:, stored:] & (table.own[:, stored:] < config.budget.threshold)
    end = table.end[:, stored:]
    late = torch.minimum(end, (table.clock + 1 + config.recent).to(end.dtype))
    return torch.cat([table.end[:, :stored], torch.where(goes, late, end)], 1)


def _most(ranking: Ranking, length: Tensor, prompt: Tensor | None) -> Tensor:
    """Keys a row may hold when it has seen `length` tokens."""
    config = ranking.config
    least = (config.sinks + config.recent + 1) if config.budget.tokens is None else 1
    if not config.keep_prompt or prompt is None:
        return config.budget.count(length, ranking.layer, ranking.layers).clamp(min=least)
    written = (length - prompt).clamp(min=0)
    return (length - written) + config.budget.count(written, ranking.layer, ranking.layers).clamp(min=least)


def at_prompt_end(ranking: Ranking, table: Table, stop: Int[Tensor, " rows"]) -> Int[Tensor, "rows keys"]:
    """Drop times where the budget holds once: from time `stop` on, when the prompt is over. Rows that are still being
    read drop nothing yet, but their statistics go on; rows that were read before are left alone."""
    clock, stored = table.clock, table.stored
    reading = (clock >= 0) & (clock < stop[:, None])
    if ranking.scorer.accumulates:
        _observe(table, reading)
    ends_here = (clock == stop[:, None] - 1).any(1)
    if not bool(ends_here.any()):
        return table.end
    # The first new token behind the prompt, or n.
    column = torch.where(reading, torch.arange(1, clock.shape[1] + 1, device=clock.device), 0).amax(1)
    alive = table.alive.clone()
    alive[:, stored:] = reading
    alive &= (table.end > stop[:, None]) & ends_here[:, None]
    length = table.position.masked_fill(~alive, -1).amax(1) + 1
    score = ranking.scorer.score(table.signals(ranking, length - 1, column, alive))
    protected = table.protected | (table.position >= (length - ranking.config.recent)[:, None])
    apart = (-1, table.heads, alive.shape[1])
    stays = chosen(
        ranking.config.budget,
        score.reshape(apart),
        alive.view(apart),
        (protected & alive).view(apart),
        length.view(-1, table.heads)[:, 0],
        ranking.layer,
        ranking.layers,
    ).view(alive.shape)
    return torch.where(alive & ~stays, torch.minimum(table.end, stop[:, None].to(table.end.dtype)), table.end)


def _observe(table: Table, reading: Bool[Tensor, "rows n"]) -> None:
    """Add to each key the attention that it gets from the new tokens of the prompt, in blocks of queries."""
    n = table.clock.shape[1]
    place = torch.arange(-table.stored, n, device=table.clock.device)
    there = table.alive.clone()
    there[:, table.stored :] = reading
    for first in range(0, n, AT_ONCE):
        block = slice(first, min(n, first + AT_ONCE))
        column, now = place[table.stored :][block], table.clock[:, block]
        seen = there[:, None] & (place <= column[:, None]) & (table.end[:, None] > now[..., None])
        seen = seen & reading[:, block, None]
        query = table.queries[:, :, table.queries.shape[2] - n :][:, :, block]
        table.received += attention(query, table.keys, seen[:, None], table.scale).mean(1).sum(1)
