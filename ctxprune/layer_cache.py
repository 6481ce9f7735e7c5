"""Where do one layer's survivors live while a model generates? In pages, through a table per row of the batch.

What is dropped frees its slot and the next token of its row takes it. Pages that are given out are always the first of
the pool: a page that is given back is filled with the last one, so that memory can be returned at any time and a step
on a CPU reads the pool as it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kernels.decode.pages import NEVER, Pages, Slots, order_of

GROWTH = 8
"""A pool that is full grows by this part of itself at least, so that growing costs little per token."""
AHEAD = 32
"""Tokens for which a row is given room at once."""
FEW = 8
"""A row with fewer slots to take is given a page, or it would be searched too often."""
STORED = ("keys", "values", "interaction", "drop_time", "guard", "position")
"""What a page holds."""
OF_A_ROW = ("table", "used", "free", "refused")


class PoolFull(Exception):
    """A pool may not grow as much as it would have to."""


class LayerCache:
    """One layer's pages and whose they are. See kernels.Pages for what they hold."""

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
        self.promised = 0
        """Tokens that every row has room for, for sure (on a GPU)."""
        self.plan: Slots | None = None
        self.taken = 0
        """Where the tokens of the coming steps go, (rows, steps), and how many of these have been taken."""
        self.spare_pages: Callable[[], int] | None = None
        """How many pages more the pool may have; None: as many as it likes."""
        self._find_order()

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

    # Giving room.
    def make_room(self, step: Int[Tensor, " rows"], *, idle: bool = False, again: bool = True) -> None:
        """Every row can take the token of this step. idle: some rows have none; again: in slots of dropped keys too.

        Where tokens go is decided for many steps at once and told to the attention, so that a step need not search. On
        a GPU the kernel searches by itself and no step waits; rows that idle are few, and short.
        """
        if self.pages.keys.is_cuda or idle:
            self._make_room_anywhere()
            return
        if self.plan is None or self.taken == self.plan.page.shape[1]:
            self.plan, self.taken = self._planned(step, again), 0
        self.pages.next = Slots(self.plan.page[:, self.taken], self.plan.place[:, self.taken])
        self.taken += 1

    def _planned(self, step: Int[Tensor, " rows"], again: bool) -> Slots:
        """Slots for the next steps, (rows, steps): the rest of each row's pages, then slots of dropped keys; a page
        more for rows that have few of both."""
        rank, count = self._takeable(step, again)
        if bool((count < FEW).any()):
            try:
                self._give((count < FEW).long())
            except PoolFull:
                if bool((count < 1).any()):
                    raise
            else:
                rank, count = self._takeable(step, again)
        slot = rank.argsort(dim=1, stable=True)[:, : min(AHEAD, int(count.min()))]
        pages = self.pages
        pages.used.copy_(torch.maximum(pages.used, slot.amax(1) + 1))
        return Slots(pages.table.gather(1, slot // pages.page).long(), slot % pages.page)

    def _takeable(self, step: Tensor, again: bool) -> tuple[Int[Tensor, "rows slots"], Int[Tensor, " rows"]]:
        """Of each row's slots along its table: 0 never used, 1 of a dropped key, 2 neither; and how many are not 2."""
        pages = self.pages
        place = torch.arange(pages.table.shape[1] * pages.page, device=step.device)
        used = place < pages.used[:, None]
        dropped = used & ~self._alive(torch.arange(self.rows, device=step.device), step - 1)
        behind = ~used & (place < (self.given() * pages.page)[:, None])
        rank = torch.where(behind, 0, torch.where(dropped, 1, 2) if again else 2)
        return rank, (rank < 2).sum(1)

    def _make_room_anywhere(self) -> None:
        """A slot that is free or a next one for every row; on a GPU for the coming steps too, since asking waits."""
        self._forget_plan()
        if self.promised > 0:
            self.promised -= 1
            return
        spare, lacking = self._lacking()
        if bool(lacking.any()):
            self._give(lacking.long())
            spare = spare + lacking * self.pages.page
        self.promised = max(1, int(spare.min())) - 1 if self.pages.keys.is_cuda else 0

    def _lacking(self) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
        """Slots behind each row's used ones, and which rows need a page for their next token."""
        pages = self.pages
        spare = self.given() * pages.page - pages.used
        return spare, spare < AHEAD if pages.keys.is_cuda else (spare < 1) & (pages.free < 0)

    def _forget_plan(self) -> None:
        if self.plan is not None:
            self.plan = None
            self.pages.free.fill_(-1)  # known to the plan alone

    def pages_for_a_step(self, step: Int[Tensor, " rows"]) -> int:
        """By how many pages the pool must grow for the token of this step in every row."""
        if self.pages.keys.is_cuda:
            wanting = 0 if self.promised > 0 else int(self._lacking()[1].sum())
        elif self.plan is not None and self.taken < self.plan.page.shape[1]:
            wanting = 0
        else:
            wanting = int((self._takeable(step, True)[1] < 1).sum())
        return max(0, self.in_use + wanting - len(self.pages.keys))

    def make_room_for(self, tokens: Int[Tensor, " rows"]) -> None:
        """Each row can take this many more tokens in its next slots."""
        self._forget_plan()
        wanted = -(-(self.pages.used + tokens) // self.pages.page)
        self._give((wanted - self.given()).clamp(min=0))
        self.promised = 0

    def _give(self, wanted: Int[Tensor, " rows"]) -> None:
        """That many more pages to each row."""
        total = int(wanted.sum())
        if total == 0:
            return
        self._resize_for(self.in_use + total)
        given = self.given()
        most = int((given + wanted).max())
        table = self.pages.table
        if most > table.shape[1]:
            table = torch.cat([table, table.new_full((len(table), most - table.shape[1]), -1)], 1)
        row = torch.repeat_interleave(wanted)
        first = (wanted.cumsum(0) - wanted)[row]
        column = given[row] + torch.arange(total, device=row.device) - first
        table[row, column] = torch.arange(self.in_use, self.in_use + total, device=row.device).to(table.dtype)
        self.pages.table = table
        self.in_use += total
        self._find_order()

    def _resize_for(self, wanted: int) -> None:
        """A pool of at least so many pages. Raises PoolFull, having changed nothing, where it may not have them."""
        capacity = len(self.pages.keys)
        if wanted <= capacity:
            return
        growth = max(wanted - capacity, capacity // GROWTH)
        if self.spare_pages is not None:
            growth = min(growth, self.spare_pages())
            if capacity + growth < wanted:
                raise PoolFull
        self._resize(capacity + growth)

    def trim(self) -> None:
        """No page in the pool that no row has."""
        if len(self.pages.keys) > max(1, self.in_use):
            self._resize(self.in_use)

    def _resize(self, capacity: int) -> None:
        """A pool of that many pages, at least one; those in use stay."""
        capacity = max(1, capacity)
        for name, buffer in self._stored():
            kept = buffer[: self.in_use]
            more = kept.new_full((capacity - len(kept), *kept.shape[1:]), -1 if name == "position" else 0)
            setattr(self.pages, name, torch.cat([kept, more]))

    def _stored(self) -> Iterator[tuple[str, Tensor]]:
        for name in STORED:
            buffer = getattr(self.pages, name)
            if buffer is not None:
                yield name, buffer

    # Giving room back.
    def compact(self, step: Int[Tensor, " rows"], spare: float = 0.0) -> None:
        """Move the survivors of `step` together in rows that then need fewer pages, and give these back.

        spare: of the pages that a row needs, the part that it may have too many of.
        """
        pages = self.pages
        count, given = pages.live(step), self.given()
        needed = -(-count // pages.page)
        chosen = (given > needed + (needed * spare).long()).nonzero().squeeze(1)
        if len(chosen) == 0:
            return
        table, alive = pages.table[chosen].long(), self._alive(chosen, step)
        row, slot = alive.nonzero(as_tuple=True)
        target = alive.cumsum(1)[row, slot] - 1
        moves = target != slot
        old, new = (
            (table[row[moves], where[moves] // pages.page], where[moves] % pages.page) for where in (slot, target)
        )
        for name, buffer in self._stored():
            if name in ("keys", "values"):
                buffer[new[0], :, new[1]] = buffer[old[0], :, old[1]]
            else:
                buffer[new] = buffer[old]
        behind = torch.arange(alive.shape[1], device=row.device) >= count[chosen][:, None]
        row, slot = (behind & (table >= 0).repeat_interleave(pages.page, 1)).nonzero(as_tuple=True)
        empty = table[row, slot // pages.page], slot % pages.page
        pages.drop_time[empty], pages.guard[empty], pages.position[empty] = 0, 0, -1
        pages.used[chosen], pages.free[chosen] = count[chosen].to(torch.int32), -1
        surplus = torch.arange(table.shape[1], device=row.device) >= needed[chosen][:, None]
        back = table[surplus & (table >= 0)]
        pages.table[chosen] = pages.table[chosen].masked_fill(surplus, -1)
        self._take_back(back)

    def _alive(self, rows: Int[Tensor, " chosen"], step: Int[Tensor, " rows"]) -> Bool[Tensor, "chosen slots"]:
        """Which slots of these rows hold a key that lives after its row's step, along the row's table."""
        table = self.pages.table[rows].long()
        times = self.pages.drop_time[table.clamp(min=0)].masked_fill((table < 0)[..., None], 0)
        return times.flatten(1) > step[rows][:, None]

    def _take_back(self, back: Int[Tensor, " pages"]) -> None:
        """Pages that no table names any more leave the pool: the last pages in use take their places."""
        left = self.in_use - len(back)
        kept = torch.ones(self.in_use, dtype=torch.bool, device=back.device)
        kept[back] = False
        hole, last = (~kept[:left]).nonzero().squeeze(1), kept[left:].nonzero().squeeze(1) + left
        for _, buffer in self._stored():
            buffer[hole] = buffer[last]
        moved = torch.arange(self.in_use + 1, device=back.device)
        moved[last] = hole
        table = self.pages.table
        self.pages.table = torch.where(table >= 0, moved[table.clamp(min=0).long()], -1).to(table.dtype)
        self.pages.clear(torch.arange(left, self.in_use, device=back.device))
        self.in_use, self.promised = left, 0
        if len(self.pages.keys) - max(1, left) > left // 4:
            self._resize(left)
        self._find_order()

    def _find_order(self) -> None:
        """After every change of the table."""
        self._forget_plan()
        self.pages.order = order_of(self.pages.table)

    # Rows that come and go.
    def select(self, rows: Int[Tensor, " chosen"]) -> None:
        """These rows, in this order; the pages of others are given back. A row named twice is copied."""
        whole = self.pages.table
        gone = torch.ones(len(whole), dtype=torch.bool, device=whole.device)
        gone[rows] = False
        for name in OF_A_ROW:
            setattr(self.pages, name, getattr(self.pages, name)[rows])
        self._copy_repeated(rows)
        self._take_back(whole[gone][whole[gone] >= 0].long())

    def _copy_repeated(self, rows: Int[Tensor, " chosen"]) -> None:
        """Pages of their own for rows that were named before."""
        again = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        seen: set[int] = set()
        for place, row in enumerate(rows.tolist()):
            again[place] = row in seen
            seen.add(row)
        if bool(again.any()):
            theirs = self.pages.table[again]
            source = theirs[theirs >= 0].long()
            self._resize_for(self.in_use + len(source))
            copies = torch.arange(self.in_use, self.in_use + len(source), device=rows.device)
            for _, buffer in self._stored():
                buffer[copies] = buffer[source]
            theirs[theirs >= 0] = copies.to(theirs.dtype)
            self.pages.table[again] = theirs
            self.in_use += len(source)

    def absorb(self, other: LayerCache) -> None:
        """The other's rows follow ours; their pages are copied."""
        ours, theirs = self.pages, other.pages
        if self.in_use + other.in_use > len(ours.keys):
            self._resize(self.in_use + other.in_use)  # whoever filled the other had the room
        for name, buffer in self._stored():
            buffer[self.in_use : self.in_use + other.in_use] = getattr(theirs, name)[: other.in_use]
        table = torch.where(theirs.table >= 0, theirs.table + self.in_use, -1)
        most = max(ours.table.shape[1], table.shape[1])
        ours.table = torch.cat([_wider(ours.table, most), _wider(table, most)])
        for name in OF_A_ROW[1:]:
            setattr(ours, name, torch.cat([getattr(ours, name), getattr(theirs, name)]))
        self.in_use, self.promised = self.in_use + other.in_use, 0
        self._find_order()

    # Dropping, and taking it back.
    def times(self) -> Int[Tensor, "rows positions"]:
        """Drop times by position, NEVER where nothing is stored."""
        pages, order = self.pages, self.pages.order or order_of(self.pages.table)
        position = pages.position[order.pages].long()
        times = pages.drop_time.new_full((self.rows, int(position.max()) + 2), NEVER)
        # Slots that hold nothing write to a place of their own, behind all positions.
        place = torch.where(position < 0, times.shape[1] - 1, position)
        times[order.row[:, None].expand_as(place), place] = pages.drop_time[order.pages]
        times[:, -1] = NEVER
        return times

    def inherit(self, times: Int[Tensor, "rows positions"]) -> None:
        """Drop every key at this time by its position, or before: when the layer above does."""
        pages, order = self.pages, self.pages.order or order_of(self.pages.table)
        position = pages.position[order.pages].long()
        inherited = times[order.row[:, None], position.clamp(max=times.shape[1] - 1)]
        pages.drop_time[order.pages] = torch.minimum(pages.drop_time[order.pages], inherited)

    def rewind(self, length: Int[Tensor, " rows"], end_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        """As if each row's tokens from position `length` on had never come: they are forgotten, and what they dropped
        lives again. Only where no slot was taken again since. end_of: drop times of positions of rows by themselves."""
        self._forget_plan()
        pages, order = self.pages, self.pages.order or order_of(self.pages.table)
        position, times = pages.position[order.pages], pages.drop_time[order.pages]
        first = length[order.row][:, None]
        times = torch.where(times >= first, end_of(position.clamp(min=0), order.row[:, None]).to(times.dtype), times)
        later = position >= first
        pages.drop_time[order.pages] = times.masked_fill(later | (position < 0), 0)
        pages.position[order.pages] = position.masked_fill(later, -1)
        slot = (order.rank * pages.page)[:, None] + torch.arange(1, pages.page + 1, device=later.device)
        slot = slot.masked_fill(pages.position[order.pages] < 0, 0).amax(1)
        used = torch.zeros(self.rows, dtype=slot.dtype, device=slot.device)
        pages.used.copy_(used.scatter_reduce_(0, order.row, slot, "amax"))
        pages.free.fill_(-1)
        self.promised = 0

    # What is there.
    def positions(self, step: Int[Tensor, " rows"]) -> list[list[int]]:
        """Of the keys alive after each row's step, rising."""
        alive = self._alive(torch.arange(self.rows, device=step.device), step)
        table = self.pages.table.long()
        position = self.pages.position[table.clamp(min=0)].flatten(1)
        return [sorted(position[row][alive[row]].tolist()) for row in range(self.rows)]

    def bytes_per_token(self) -> int:
        """Of a key, its value and its interaction key."""
        pages, rank = self.pages, self.pages.interaction.shape[-1] if self.pages.interaction is not None else 0
        return (2 * pages.keys.shape[1] * pages.keys.shape[3] + rank) * pages.keys.element_size()

    def page_bytes(self) -> int:
        """Of one page, integers included."""
        return self.pages.page * (self.bytes_per_token() + 3 * 4)

    def allocated_bytes(self) -> int:
        """Of the pool."""
        return len(self.pages.keys) * self.page_bytes()

    def used_bytes(self) -> int:
        """Of the pages that rows have."""
        return self.in_use * self.page_bytes()


def _wider(table: Int[Tensor, "rows most"], most: int) -> Int[Tensor, "rows wider"]:
    return torch.cat([table, table.new_full((len(table), most - table.shape[1]), -1)], 1)
