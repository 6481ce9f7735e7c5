"""How does a layer attend under a policy that ranks its keys? It decides when queries and keys are there, then attends
under the drop times, over whole rows or over what a cache holds."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune import kernels
from ctxprune.cache.pruned_cache import SPARE, PrunedCache
from ctxprune.cache.watched_layer import Known, WatchedLayer
from ctxprune.errors import UserError
from ctxprune.kernels.decode.pages import NEVER
from ctxprune.policies.rule import Ranking
from ctxprune.policies.scorer import Arrivals
from ctxprune.precision import exact
from ctxprune.ranking import Table, at_prompt_end, by_step, on_arrival


@dataclass
class Decisions:
    """What ranking cost, and how often: the overhead of a policy, summed over layers."""

    seconds: float = 0.0
    calls: int = 0


@dataclass
class Ranked:
    """One layer's attention under a ranking, over whole rows.

    hidden, ids: of the tokens at hand; position, clock: (batch, n), clock negative where there is no token; end: first
    time that no longer sees each token by itself, (batch, n); protected: (batch, n) tokens that nothing drops; prompt:
    (batch,) when each row's prompt is over, in the units of clock; decisions: where the cost is added up, or None;
    index: the layer; record: where it leaves its drop times, or None.
    """

    ranking: Ranking
    hidden: Tensor
    ids: Tensor | None
    position: Int[Tensor, "batch n"]
    clock: Int[Tensor, "batch n"]
    end: Int[Tensor, "batch n"]
    protected: Tensor
    prompt: Int[Tensor, " batch"] | None
    decisions: Decisions | None
    index: int
    record: dict[int, Tensor] | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query, key, value (batch, heads, n, width) -> (batch, heads, n, width)."""
        drop, _ = self.decide(query, key, value, scale, None, None)
        heads = self.heads(key)
        drop = drop if heads == 1 else drop.view(len(key), heads, -1)
        if self.record is not None:
            self.record[self.index] = drop
        return kernels.drop_time_attention(query, key, value, drop, scale=scale)

    def heads(self, key: Tensor) -> int:
        """Rows per sequence: KV heads that decide apart."""
        return key.shape[1] if self.ranking.config.apart else 1

    @torch.no_grad()
    def decide(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, layer: WatchedLayer | None, known: Known | None
    ) -> tuple[Int[Tensor, "rows keys"], Table]:
        """Drop times of what is known, then of the new tokens, and the table with its statistics."""
        start = time.perf_counter()
        table = self._table(query, key, value, scale, layer, known)
        rows_prompt = None if self.prompt is None else self.prompt.repeat_interleave(table.heads)
        if self.ranking.on_arrival:
            drop = on_arrival(self.ranking, table)
        elif self.ranking.config.when == "step":
            drop = by_step(self.ranking, table, _position_of(rows_prompt, table))
        else:
            assert rows_prompt is not None
            drop = at_prompt_end(self.ranking, table, rows_prompt)
        if self.decisions is not None:
            self.decisions.seconds += time.perf_counter() - start
            self.decisions.calls += 1
        return drop, table

    def _table(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, layer: WatchedLayer | None, known: Known | None
    ) -> Table:
        scorer, heads = self.ranking.scorer, self.heads(key)
        own = scorer.own(Arrivals(self.hidden, self.ids, self.position, key, value))
        query, key, value = (_apart(tensor, heads) for tensor in (query, key, value))
        rows, n = len(key), key.shape[2]
        number = exact(key.dtype)
        if own is None:
            own = torch.zeros(rows, n, dtype=number, device=key.device)
        elif own.ndim == 2:
            own = own.repeat_interleave(heads, 0)
        own, received = own.reshape(rows, n).to(number), torch.zeros(rows, n, dtype=number, device=key.device)
        real = self.clock >= 0
        position, clock, end, protected = (
            tensor.repeat_interleave(heads, 0)
            for tensor in (self.position.masked_fill(~real, -1), self.clock, self.end, self.protected)
        )
        new = Table(
            position, torch.zeros_like(protected), end, protected, key, value, own, received, query,
            position, clock, heads, scale,
        )  # fmt: skip
        if layer is None or layer.queries is None or layer.query_position is None:
            return new
        queries = torch.cat([layer.queries, query], 2)
        new = replace(new, queries=queries, query_position=torch.cat([layer.query_position, position], 1))
        if known is None:
            return new
        for name in ("position", "alive", "end", "protected", "own", "received"):
            before = getattr(known, name)
            setattr(new, name, torch.cat([before, getattr(new, name).to(before.dtype)], 1))
        return replace(new, keys=_beside(known.keys, key), values=_beside(known.values, value))


@dataclass
class CachedRanked(Ranked):
    """The same over a layer's cache, which takes the new tokens in; clock counts positions."""

    cache: PrunedCache

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query (batch, heads, n, width) -> (batch, heads, n, width)."""
        scorer, heads, first = self.ranking.scorer, self.heads(key), self.index >= len(self.cache.held)
        layer = self._new_layer(query, key) if first else self.cache.held[self.index]
        assert isinstance(layer, WatchedLayer)
        step, length = (_rows(tensor, heads) for tensor in (self.cache.new.step, self.cache.new.length))
        apart = [_apart(tensor, heads) for tensor in (query, key, value)]
        if layer.queries is None:  # nothing is ranked any more
            drop = _rows(self.end, heads)
        else:
            before = torch.where(step >= 0, step, NEVER).amin(1)
            # Nothing is asked of older keys where each is decided when it comes.
            known = None if first or self.ranking.on_arrival else layer.known(torch.minimum(before, length) - 1, scorer)
            drop, table = self.decide(query, key, value, scale, layer, known)
            if known is not None:
                layer.write(known, drop[:, : table.stored], table.received[:, : table.stored])
            drop = drop[:, table.stored :]
        over = layer.queries is not None and self._over()
        output = self._store(layer, apart, step, drop.to(torch.int32), scale, length if over else length - 1, first)
        if layer.queries is not None:
            layer.mark(step, table.own[:, table.stored :], table.received[:, table.stored :])
            layer.remember(table.queries, table.query_position)
            if over:
                layer.settle(length)
                layer.forget()
                layer.compact(length - 1, SPARE)
        if query.shape[2] > 1:
            layer.compact(length - 1, SPARE)
        return output.reshape(len(output) // heads, -1, *output.shape[2:])

    def _over(self) -> bool:
        """Whether every row's prompt is over after these tokens, and nothing will be ranked any more."""
        if self.ranking.config.when == "step":
            return False
        assert self.prompt is not None
        return bool((self.prompt <= self.cache.new.length).all())

    def _new_layer(self, query: Tensor, key: Tensor) -> WatchedLayer:
        heads = self.heads(key)
        batch, kv_heads, _, width = key.shape
        layer = WatchedLayer(
            batch * heads, kv_heads=kv_heads // heads, width=width, rank=None, page=self.cache.page,
            dtype=key.dtype, device=key.device,
        )  # fmt: skip
        layer.watch(self.ranking.scorer, query.shape[1] // heads, marks=self.ranking.marks)
        self.cache.hold(layer)
        return layer

    def _store(
        self, layer: WatchedLayer, apart: list[Tensor], step: Tensor, drop: Tensor, scale: float, gone: Tensor,
        first: bool,
    ) -> Tensor:  # fmt: skip
        """Take the new tokens in and attend; those of a first pass that are dropped up to step `gone` (rows,) are never
        stored."""
        (query, key, value), new = apart, self.cache.new
        heads, n = len(step) // len(new.step), query.shape[2]
        guard = _rows(new.guard, heads)
        if n == 1:
            layer.make_room(step[:, 0], idle=new.real is not None)
            return kernels.decode_attention(
                query[:, :, 0], key[:, :, 0], value[:, :, 0], None, None, None, step[:, 0], layer.pages,
                guard=guard[:, 0], drop_time=drop[:, 0], scale=scale, check=False,
            )[:, :, None]  # fmt: skip
        if not first:
            layer.make_room_for((step >= 0).sum(1))
            return kernels.extend_attention(
                query, key, value, None, None, None, step, layer.pages, guard=guard, drop_time=drop, scale=scale
            )
        # By columns, which the kernel for whole rows counts in: a row's tokens stand together.
        by_column = torch.where(drop == NEVER, n, (drop.long() - step.amax(1, keepdim=True)) + _last(step))
        by_column = torch.where(step >= 0, by_column, torch.arange(1, n + 1, device=step.device))
        stored = (step >= 0) & (drop > gone[:, None])
        layer.make_room_for(stored.sum(1))
        layer.pages.store(key, value, None, step.masked_fill(~stored, -1), guard, drop)
        return kernels.drop_time_attention(query, key, value, by_column, scale=scale)


def _last(step: Int[Tensor, "rows n"]) -> Int[Tensor, "rows 1"]:
    """Column of each row's last token."""
    place = torch.arange(step.shape[1], device=step.device)
    return torch.where(step >= 0, place, 0).amax(1, keepdim=True)


def _apart(tensor: Tensor, heads: int) -> Tensor:
    """(batch, heads of all, n, width) -> (batch * heads, heads of one, n, width)."""
    batch, _, n, width = tensor.shape
    return tensor if heads == 1 else tensor.reshape(batch * heads, -1, n, width)


def _rows(tensor: Tensor, heads: int) -> Tensor:
    """What belongs to a sequence, for each of its rows."""
    return tensor if heads == 1 else tensor.repeat_interleave(heads, 0)


def _beside(known: Tensor, new: Tensor) -> Tensor:
    """Stored keys, then new ones; where the scorer looks at none, the new ones alone have numbers, and nobody asks."""
    if known.shape[-1] != new.shape[-1]:
        return new.new_zeros(*known.shape[:2], known.shape[2] + new.shape[2], 0)
    return torch.cat([known, new], 2)


def goes_on(config) -> bool:
    """Whether a layer's keys are not a plain cache's once prompts are over: they are ranked on, or kept per head."""
    return config.when == "step" or config.apart


def refuse(cache: PrunedCache) -> None:
    """UserError for what a ranking cannot do with this cache."""
    if cache.alarm is not None:
        raise UserError("an alarm goes with gates and rules by position, not with a policy that ranks keys")
    if cache.reversible:
        raise UserError("a policy that ranks keys cannot take tokens back: decode without assisted or lossless mode")
    if cache.max_live_tokens is not None:
        raise UserError("this policy has a budget of its own: set that, not max_live_tokens")


def _position_of(prompt: Int[Tensor, " rows"] | None, table: Table) -> Int[Tensor, " rows"] | None:
    """The positions at which prompts are over, from times: in whole rows these are columns, which padding has too."""
    if prompt is None:
        return None
    before = table.clock - table.position[:, table.stored :]
    return prompt - before.masked_fill(table.clock < 0, 0).amax(1)
