"""Where do dropped keys wait for an alarm? In a second pool, in small pages with a sketch of what is in them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ctxprune.cache.layer_cache import LayerCache
from ctxprune.kernels.decode.pages import NEVER, Order, order_of

COLD_PAGE = 16
"""Keys per page of the cold store: smaller ones are bounded more tightly, and their sketches take an eighth of their
keys' bytes."""


class ColdStore(LayerCache):
    """A layer's dropped keys. smallest, largest: (pages, kv_heads, width), of each number of the keys in a page; count:
    (pages,) how many these are."""

    of_a_page = ("smallest", "largest", "count")
    smallest: Tensor
    largest: Tensor
    count: Tensor

    @staticmethod
    def beside(hot: LayerCache) -> ColdStore:
        """An empty one for a layer's rows."""
        pages = hot.pages
        _, kv_heads, _, width = pages.keys.shape
        rank = None if pages.interaction is None else pages.interaction.shape[-1]
        dtype, device = pages.keys.dtype, pages.keys.device
        cold = ColdStore(
            hot.rows, kv_heads=kv_heads, width=width, rank=rank, page=COLD_PAGE, dtype=dtype, device=device
        )
        cold.smallest, cold.largest = pages.keys.new_zeros(2, 1, kv_heads, width)
        cold.count = torch.zeros(1, dtype=torch.int32, device=device)
        cold.grew = hot.grew
        return cold

    def buffers(self) -> Iterator[tuple[object, str, Tensor]]:
        yield from super().buffers()
        for name in self.of_a_page:
            if hasattr(self, name):
                yield self, name, getattr(self, name)

    def sketch(self, pages: Int[Tensor, " pages"]) -> None:
        """Look at what these pages hold now."""
        held = (self.pages.position[pages] >= 0)[:, None, :, None]
        keys = self.pages.keys[pages]
        self.smallest[pages] = keys.masked_fill(~held, torch.inf).amin(2).nan_to_num(posinf=0.0)
        self.largest[pages] = keys.masked_fill(~held, -torch.inf).amax(2).nan_to_num(neginf=0.0)
        self.count[pages] = held.flatten(1).sum(1).to(torch.int32)


def archive(hot: LayerCache, cold: ColdStore, step: Int[Tensor, " rows"]) -> None:
    """Move every key that is dropped at or before its row's step to the cold store; its slot is empty then."""
    pages, order = hot.pages, hot.pages.order or order_of(hot.pages.table)
    position = pages.position[order.pages]
    dead = (position >= 0) & (pages.drop_time[order.pages] <= step[order.row][:, None])
    if not bool(dead.any()):
        return
    column = cold.pages.used // COLD_PAGE
    place = move(hot, cold, order, dead, guard=NEVER, drop_time=NEVER)
    _forget(hot, place)
    table = cold.pages.table
    new = (table >= 0) & (torch.arange(table.shape[1], device=table.device) >= column[:, None])
    cold.sketch(table[new].long())


def bring_back(
    hot: LayerCache,
    cold: ColdStore,
    order: Order,
    pages: Bool[Tensor, " pages"],
    guard: Int[Tensor, " rows"],
    drop_time: Int[Tensor, " rows"] | int,
) -> int:
    """Move the keys of these cold pages (along cold's order) back; how many they were."""
    chosen = pages[:, None] & (cold.pages.position[order.pages] >= 0)
    place = move(cold, hot, order, chosen, guard, drop_time)
    _forget(cold, place)
    cold.compact(torch.zeros(cold.rows, dtype=torch.int32, device=pages.device))
    cold.sketch(torch.arange(cold.in_use, device=pages.device))
    return len(place[0])


def _forget(layer: LayerCache, place: tuple[Tensor, Tensor]) -> None:
    layer.pages.drop_time[place], layer.pages.guard[place], layer.pages.position[place] = 0, 0, -1


def move(
    source: LayerCache,
    target: LayerCache,
    order: Order,
    chosen: Bool[Tensor, "pages page"],
    guard: Int[Tensor, " rows"] | int,
    drop_time: Int[Tensor, " rows"] | int,
) -> tuple[Tensor, Tensor]:
    """Copy chosen slots to the next slots of their rows elsewhere; returns where they were, (pages, places)."""
    where, place = chosen.nonzero(as_tuple=True)
    row = order.row[where]
    by_row = row.argsort(stable=True)
    where, place, row = where[by_row], place[by_row], row[by_row]
    page = torch.arange(len(source.pages.keys), device=row.device)[order.pages][where]
    count = torch.bincount(row, minlength=source.rows)
    column = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    shape = (source.rows, int(count.max()))

    def rows_of(buffer: Tensor) -> Tensor:
        """(slots, ...) -> (rows, most, ...)."""
        padded = buffer.new_zeros(*shape, *buffer.shape[1:])
        padded[row, column] = buffer
        return padded

    pages = source.pages
    step = torch.full(shape, -1, dtype=torch.int32, device=row.device)
    step[row, column] = pages.position[page, place]
    interaction = None if pages.interaction is None else rows_of(pages.interaction[page, place])
    until = [
        torch.as_tensor(limit, dtype=torch.int32, device=row.device).expand(source.rows)[:, None].expand(shape)
        for limit in (guard, drop_time)
    ]
    target.make_room_for(count)
    keys, values = (rows_of(t[page, :, place]).transpose(1, 2) for t in (pages.keys, pages.values))
    target.pages.store(keys, values, interaction, step, *until)
    return page, place
