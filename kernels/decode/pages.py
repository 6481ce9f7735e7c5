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


@dataclass
class Pages:
    """One layer's pool, and the rows (sequences) that use it. A slot is live at step t iff t < its drop time.

    keys, values: (pages, kv_heads, page, width). interaction: (pages, page, rank), or None without gates.
    drop_time: (pages, page) int32, 0 where nothing was ever stored. guard: (pages, page) int32, the first step whose
    gate may drop the key. table: (rows, most) int32, a row's pages in order, -1 behind the last. used: (rows,) int32,
    slots of the row that were ever taken. free: (rows,) int32, one of those that is free again, or -1. refused: (rows,)
    int32, tokens that found no room.
    """

    keys: Tensor
    values: Tensor
    interaction: Tensor | None
    drop_time: Tensor
    guard: Tensor
    table: Tensor
    used: Tensor
    free: Tensor
    refused: Tensor

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
            table=integers(rows, most, value=-1),
            used=integers(rows),
            free=integers(rows, value=-1),
            refused=integers(rows),
        )

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
