"""What must a layer's cache remember so that its keys can be ranked? Two numbers beside each key, and the last queries.

Where KV heads decide apart each of them is a row of its own, so that pages are freed head by head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune.cache.layer_cache import LayerCache
from ctxprune.kernels.decode.pages import NEVER, order_of
from ctxprune.policies.scorer import Scorer
from ctxprune.precision import exact
from ctxprune.ranking import Keys


@dataclass
class Known(Keys):
    """The keys alive. slot: where each is along its row's table."""

    slot: Int[Tensor, "rows keys"]


class WatchedLayer(LayerCache):
    """A layer's pages with (pages, page, 2) `marks`, what a key was worth by itself and the attention it got, and the
    last (rows, heads, window, width) `queries` with their positions. None once nothing will be ranked any more."""

    marks: Tensor | None = None
    queries: Tensor | None = None
    query_position: Tensor | None = None

    def watch(self, scorer: Scorer, heads: int, *, marks: bool) -> None:
        """Begin to remember what this scorer looks at; heads: query heads per row; marks: two numbers of each key."""
        keys = self.pages.keys
        if marks:
            self.marks = torch.zeros(*self.pages.position.shape, 2, dtype=exact(keys.dtype), device=keys.device)
        self.queries = keys.new_zeros(self.rows, heads, scorer.window, keys.shape[-1])
        self.query_position = torch.full((self.rows, scorer.window), -1, device=keys.device)

    def forget(self) -> None:
        """Nothing will be ranked any more."""
        self.marks = self.queries = self.query_position = None

    def buffers(self) -> Iterator[tuple[object, str, Tensor]]:
        yield from super().buffers()
        if self.marks is not None:
            yield self, "marks", self.marks

    def bytes_per_token(self) -> int:
        return super().bytes_per_token() + (0 if self.marks is None else 2 * self.marks.element_size())

    def row_bytes(self) -> int:
        return 0 if self.queries is None else self.queries.numel() * self.queries.element_size()

    def select(self, rows: Int[Tensor, " chosen"]) -> None:
        super().select(rows)
        if self.queries is not None and self.query_position is not None:
            self.queries, self.query_position = self.queries[rows], self.query_position[rows]

    def absorb(self, other: LayerCache) -> None:
        super().absorb(other)
        if self.queries is not None and self.query_position is not None:
            assert isinstance(other, WatchedLayer) and other.queries is not None and other.query_position is not None
            self.queries = torch.cat([self.queries, other.queries])
            self.query_position = torch.cat([self.query_position, other.query_position])

    def known(self, last: Int[Tensor, " rows"], scorer: Scorer) -> Known:
        """What lives after each row's step `last`; keys and values have no width where the scorer does not look at
        them."""
        pages = self.pages
        table = pages.table.clamp(min=0).long()
        position = pages.position[table].flatten(1)
        # Of a row that has read nothing yet, `last` is -1 and empty slots would seem alive.
        alive = self._alive(torch.arange(self.rows, device=last.device), last.clamp(min=0))
        order = position.masked_fill(~alive, NEVER).argsort(dim=1)
        slot = order[:, : int(alive.sum(1).max())]
        page, place = table.gather(1, slot // pages.page), slot % pages.page
        alive = alive.gather(1, slot)
        # An index on either side of a slice puts the slice last: (rows, keys, kv_heads, width).
        keys, values = (
            buffer[page, :, place].transpose(1, 2)
            if scorer.looks_at_keys
            else buffer.new_zeros(*slot.shape, 0)[:, None]
            for buffer in (pages.keys, pages.values)
        )
        marks = self.marks[page, place] if self.marks is not None else nothing(slot, pages.keys)
        protected = pages.guard[page, place] == NEVER
        return Known(
            position.gather(1, slot).masked_fill(~alive, -1), alive, pages.drop_time[page, place], protected,
            keys, values, marks[..., 0], marks[..., 1], slot,
        )  # fmt: skip

    def write(self, known: Known, drop_time: Int[Tensor, "rows keys"], received: Float[Tensor, "rows keys"]) -> None:
        """New drop times and statistics of keys that were there before."""
        table = self.pages.table.clamp(min=0).long()
        page, place = table.gather(1, known.slot // self.pages.page), known.slot % self.pages.page
        page, place = page[known.alive], place[known.alive]
        self.pages.drop_time[page, place] = drop_time[known.alive].to(torch.int32)
        if self.marks is not None:
            self.marks[page, place, 1] = received[known.alive]

    def settle(self, length: Int[Tensor, " rows"]) -> None:
        """What the query at position `length` will not see is gone now: what the end of a prompt drops need not wait
        for the next token."""
        pages = self.pages
        order = pages.order or order_of(pages.table)
        times, next_one = pages.drop_time[order.pages], length[order.row][:, None]
        settled = torch.where(times <= next_one, torch.minimum(times, (next_one - 1).to(times.dtype)), times)
        pages.drop_time[order.pages] = settled

    def mark(self, step: Int[Tensor, "rows n"], own: Tensor, received: Tensor) -> None:
        """The numbers of tokens that were just stored, by their positions; of those that were not, nothing."""
        if self.marks is None:
            return
        pages = self.pages
        table = pages.table.long()
        # Slots by position; those that hold nothing write to a place of their own, behind all positions.
        position = pages.position[table.clamp(min=0)].masked_fill((table < 0)[..., None], -1).flatten(1).long()
        most = int(torch.maximum(position.max(), step.max())) + 1
        where = torch.full((self.rows, most + 1), -1, device=step.device)
        slots = torch.arange(position.shape[1], device=step.device).expand_as(position)
        where.scatter_(1, torch.where(position < 0, most, position), slots)
        where[:, most] = -1
        slot = where.gather(1, torch.where(step < 0, most, step).long())
        row, column = (slot >= 0).nonzero(as_tuple=True)
        slot = slot[row, column]
        page, place = table[row, slot // pages.page], slot % pages.page
        self.marks[page, place] = torch.stack([own, received], -1)[row, column]

    def remember(self, queries: Tensor, position: Int[Tensor, "rows asked"]) -> None:
        """Keep the last real ones of these, (rows, heads, asked, width), whose positions are not negative."""
        assert self.queries is not None
        window = self.queries.shape[2]
        taken = (position >= 0).long().argsort(dim=1, stable=True)[:, position.shape[1] - window :]
        self.query_position = position.gather(1, taken)
        shape = (-1, queries.shape[1], -1, queries.shape[3])
        self.queries = queries.gather(2, taken[:, None, :, None].expand(shape))


def nothing(of: Tensor, keys: Tensor) -> Tensor:
    """Marks of keys that have none: (rows, keys, 2)."""
    return torch.zeros(*of.shape, 2, dtype=exact(keys.dtype), device=of.device)
