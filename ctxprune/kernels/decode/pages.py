"""Where do the keys of many sequences live while they decode? In pages of one pool, through a table per sequence.

A slot holds one key. The order of slots means nothing (attention is a sum), so a key that is gone leaves its slot to
the next token and nothing is ever moved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = 2**31 - 1
"""Drop time of a key that nothing has dropped yet, guard of a key that no gate may drop."""

PAGE_SIZES = (16, 32, 64, 128)
"""Slots per page that the kernels take: one tile."""


@dataclass(frozen=True)
class Order:
    """The pages that rows use, for a step that computes them all at once. pages: which of the pool, a slice where they
    are its first ones; row, rank: (pages,) whose each is, and its place in that row's table; one_each: whether every
    row has exactly one page; in_order: and these lie as the rows do."""

    pages: slice | Tensor
    row: Tensor
    rank: Tensor
    one_each: bool
    in_order: bool

    def of_pages(self, rows: Tensor) -> Tensor:
        """What belongs to the row of each page: (rows, ...) -> (pages, ...)."""
        return rows if self.in_order else rows[self.row]


def order_of(table: Tensor) -> Order:
    """The pages in a table (rows, most), in the order of the pool."""
    most = table.shape[1]
    place = (table.flatten() >= 0).nonzero().squeeze(1)
    pages, order = table.flatten()[place].long().sort()
    place = place[order]
    row, every = place // most, torch.arange(len(table), device=table.device)
    first = torch.equal(pages, torch.arange(len(pages), device=table.device))
    one_each, in_order = torch.equal(row.sort().values, every), torch.equal(row, every)
    return Order(slice(0, len(pages)) if first else pages, row, place % most, one_each, in_order)


@dataclass(frozen=True)
class Slots:
    """Where the next token of every row goes: (rows,) pages of the pool, and places in them."""

    page: Tensor
    place: Tensor


@dataclass
class Pages:
    """One layer's pool, and the rows (sequences) that use it. A slot is live at step t iff t < its drop time.

    keys, values: (pages, kv_heads, page, width). interaction: (pages, page, rank), or None without gates.
    drop_time: (pages, page) int32, 0 where nothing was ever stored. guard: (pages, page) int32, the first step whose
    gate may drop the key. position: (pages, page) int32, the step of the key's own token, -1 where nothing was ever
    stored. table: (rows, most) int32, a row's pages in order, -1 behind the last. used: (rows,) int32,
    slots of the row that were ever taken. free: (rows,) int32, one of those that is free again, or -1. refused: (rows,)
    int32, tokens that found no room.
    """

    keys: Tensor
    values: Tensor
    interaction: Tensor | None
    drop_time: Tensor
    guard: Tensor
    position: Tensor
    table: Tensor
    used: Tensor
    free: Tensor
    refused: Tensor
    order: Order | None = None
    """What `order_of(table)` says, kept by whoever gives out pages so that no step need find it again; None: found at
    every step."""
    next: Slots | None = None
    """Where the tokens of the next step go, where whoever gives out pages has decided it; `used` and `free` are then
    left as they are. Only the torch and the native path ask."""

    @staticmethod
    def empty(
        pages: int,
        rows: int,
        most: int,
        *,
        kv_heads: int,
        width: int,
        rank: int | None,
        page: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Pages:
        """A pool of `pages` pages of `page` slots, and `rows` rows of at most `most` pages, none given out yet.

        Raises ValueError if the kernels do not take the page size.
        """
        if page not in PAGE_SIZES:
            raise ValueError(f"page is {page}; accepted values are {PAGE_SIZES}")

        def integers(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return Pages(
            keys=numbers(pages, kv_heads, page, width),
            values=numbers(pages, kv_heads, page, width),
            interaction=None if rank is None else numbers(pages, page, rank),
            drop_time=integers(pages, page),
            guard=integers(pages, page),
            position=integers(pages, page, value=-1),
            table=integers(rows, most, value=-1),
            used=integers(rows),
            free=integers(rows, value=-1),
            refused=integers(rows),
        )

    def store(
        self,
        key: Tensor,
        value: Tensor,
        interaction_key: Tensor | None,
        step: Tensor,
        guard: Tensor,
        drop_time: Tensor,
    ) -> None:
        """Write tokens into the next slots of their rows, in their order: key, value (rows, kv_heads, n, width),
        interaction_key (rows, n, rank), the others (rows, n) int32; those of negative step are left out.

        Raises ValueError, before anything is written, where a row has too few pages.
        """
        real, most = step >= 0, self.table.shape[1]
        slot, used = self.used[:, None] + real.cumsum(1) - 1, self.used + real.sum(1)
        page = self.table.gather(1, (slot // self.page).clamp_(0, most - 1))
        if bool((used > most * self.page).any()) or bool((page[real] < 0).any()):
            raise ValueError("pages: a row has no room for its tokens; give it more pages")
        row, column = real.nonzero(as_tuple=True)
        page, place = page[real].long(), slot[real] % self.page
        self.keys[page, :, place] = key[row, :, column].to(self.keys.dtype)
        self.values[page, :, place] = value[row, :, column].to(self.values.dtype)
        self.guard[page, place], self.drop_time[page, place] = guard[real], drop_time[real]
        self.position[page, place] = step[real]
        if interaction_key is not None and self.interaction is not None:
            self.interaction[page, place] = interaction_key[real].to(self.interaction.dtype)
        self.used.copy_(used)

    def clear(self, pages: Tensor) -> None:
        """Forget what these pages (indices) held: what a page needs before it is given to another row. Values too, as
        a slot that is not seen may be multiplied by 0, and what is no number stays none."""
        self.drop_time[pages], self.guard[pages], self.position[pages] = 0, 0, -1
        self.values[pages] = 0

    @property
    def page(self) -> int:
        """Slots per page."""
        return self.keys.shape[2]

    def live(self, step: Tensor) -> Tensor:
        """Keys alive after each row's step (rows,): (rows,) integers."""
        room = self.table.shape[1] * self.page
        mine = self.table.clamp(min=0).long()
        times = self.drop_time[mine].view(len(mine), room)
        taken = torch.arange(room, device=times.device) < self.used[:, None]
        return (taken & (times > step[:, None])).sum(1)
