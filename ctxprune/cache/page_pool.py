"""Whose is each page of a layer? A pool that grows and shrinks with what its rows hold.

Pages that are given out are always the first of the pool: a page that is given back is filled with the last one, so
that memory can be returned at any time and a step on a CPU reads the pool as it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune.kernels.decode.pages import Pages, order_of

GROWTH = 8
"""A pool that is full grows by this part of itself at least, so that growing costs little per token."""
STORED = ("keys", "values", "interaction", "drop_time", "guard", "position")
"""What a page holds."""
OF_A_ROW = ("table", "used", "free", "refused")


class PoolFull(Exception):
    """A pool may not grow as much as it would have to."""


class PagePool:
    """One layer's pages, and how many of them rows have. See kernels.Pages for what they hold."""

    def __init__(
        self,
        rows: int,
        *,
        kv_heads: int,
        width: int,
        rank: int | None,
        page: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        """For `rows` rows of which nothing is stored yet. rank: of the interaction keys; None without gates."""
        self.pages = Pages.empty(
            1, rows, 1, kv_heads=kv_heads, width=width, rank=rank, page=page, dtype=dtype, device=device
        )
        self.in_use = 0
        """Pages given out."""
        self.spare_bytes: Callable[[], int] | None = None
        """How many bytes more the pool may take; None: as many as it likes."""
        self.grew: Callable[[], None] | None = None
        """Told after every change of how many pages there are."""
        self.reserved = 0
        """Pages that the pool keeps, whoever gives some back."""
        self.moves = 0
        """How often pages or the table may have got another place in memory, or other rows."""
        self._table_changed()

    @property
    def rows(self) -> int:
        return len(self.pages.table)

    @property
    def gated(self) -> bool:
        """Whether interaction keys are kept."""
        return self.pages.interaction is not None

    def given(self) -> Int[Tensor, " rows"]:
        """Pages of each row."""
        return (self.pages.table >= 0).sum(1)

    def give(self, wanted: Int[Tensor, " rows"], *, exact: bool = False) -> None:
        """That many more pages to each row. exact: the pool grows by no more than these."""
        total = int(wanted.sum())
        if total == 0:
            return
        self.resize_for(self.in_use + total, exact=exact)
        given = self.given()
        table = wider(self.pages.table, int((given + wanted).max()))
        row = torch.repeat_interleave(wanted)
        first = (wanted.cumsum(0) - wanted)[row]
        column = given[row] + torch.arange(total, device=row.device) - first
        table[row, column] = torch.arange(self.in_use, self.in_use + total, device=row.device).to(table.dtype)
        self.pages.table = table
        self.in_use += total
        self._table_changed()

    def resize_for(self, wanted: int, *, exact: bool = False) -> None:
        """A pool of at least so many pages. Raises PoolFull, having changed nothing, where it may not have them."""
        capacity = len(self.pages.keys)
        if wanted <= capacity:
            return
        growth = wanted - capacity if exact else max(wanted - capacity, capacity // GROWTH)
        if self.spare_bytes is not None:
            growth = min(growth, self.spare_bytes() // self.page_bytes())
            if capacity + growth < wanted:
                raise PoolFull
        self._resize(capacity + growth)

    def reserve(self, pages: int) -> None:
        """A pool of at least so many pages, and never of fewer until `trim`: every growing and shrinking copies all of
        it, which is spared where what will be needed is known. Raises PoolFull as resize_for does."""
        self.resize_for(pages, exact=True)
        self.reserved = max(self.reserved, pages)

    def growth_for(self, pages: int) -> int:
        """By how many pages the pool must grow to give that many."""
        return max(0, self.in_use + pages - len(self.pages.keys))

    def trim(self) -> None:
        """No page in the pool that no row has, reserved or not."""
        self.reserved = 0
        if len(self.pages.keys) > max(1, self.in_use):
            self._resize(self.in_use)

    def _resize(self, capacity: int) -> None:
        """A pool of that many pages, at least one; those in use stay."""
        capacity = max(1, capacity)
        for holder, name, buffer in self.buffers():
            kept = buffer[: self.in_use]
            more = kept.new_full((capacity - len(kept), *kept.shape[1:]), -1 if name == "position" else 0)
            setattr(holder, name, torch.cat([kept, more]))
        self.moves += 1
        if self.grew is not None:
            self.grew()

    def buffers(self) -> Iterator[tuple[object, str, Tensor]]:
        """All that exists once per page: (whose attribute, its name, (pages, ...))."""
        for name in STORED:
            buffer = getattr(self.pages, name)
            if buffer is not None:
                yield self.pages, name, buffer

    def take_back(self, back: Int[Tensor, " pages"]) -> None:
        """Pages that no table names any more leave the pool: the last pages in use take their places."""
        left = self.in_use - len(back)
        kept = torch.ones(self.in_use, dtype=torch.bool, device=back.device)
        kept[back] = False
        hole, last = (~kept[:left]).nonzero().squeeze(1), kept[left:].nonzero().squeeze(1) + left
        for _, _, buffer in self.buffers():
            buffer[hole] = buffer[last]
        moved = torch.arange(self.in_use + 1, device=back.device)
        moved[last] = hole
        table = self.pages.table
        table.copy_(torch.where(table >= 0, moved[table.clamp(min=0).long()], -1))
        self.pages.clear(torch.arange(left, self.in_use, device=back.device))
        self.in_use = left
        needed = max(1, left, self.reserved)
        if len(self.pages.keys) - needed > needed // 4:
            self._resize(needed)
        self._table_changed()

    def _table_changed(self) -> None:
        """After every change of the table."""
        self.moves += 1
        # Kernels of a GPU do not ask for it, and finding it waits.
        self.pages.order = None if self.looks_ahead else order_of(self.pages.table)

    @property
    def looks_ahead(self) -> bool:
        """Whether the host waits for an answer of the device, and so asks for many steps at once."""
        return self.pages.keys.is_cuda

    def bytes_per_token(self) -> int:
        """Of a key, its value and its interaction key."""
        pages, rank = self.pages, self.pages.interaction.shape[-1] if self.pages.interaction is not None else 0
        return (2 * pages.keys.shape[1] * pages.keys.shape[3] + rank) * pages.keys.element_size()

    def page_bytes(self) -> int:
        """Of one page, integers included."""
        return self.pages.page * (self.bytes_per_token() + 3 * 4)

    def row_bytes(self) -> int:
        """Of what is kept for rows beside their pages."""
        return 0

    def allocated_bytes(self) -> int:
        """Of the pool."""
        return len(self.pages.keys) * self.page_bytes() + self.row_bytes()

    def used_bytes(self) -> int:
        """Of the pages that rows have."""
        return self.in_use * self.page_bytes() + self.row_bytes()


def wider(table: Int[Tensor, "rows most"], most: int) -> Int[Tensor, "rows wider"]:
    """A table for at least so many pages of each row."""
    missing = most - table.shape[1]
    return table if missing <= 0 else torch.cat([table, table.new_full((len(table), missing), -1)], 1)
