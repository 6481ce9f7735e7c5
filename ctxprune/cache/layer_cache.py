"""Where do one layer's survivors live while a model generates? In pages, through a table per row of the batch.

What is dropped frees its slot and the next token of its row takes it. Which slots the coming tokens take is planned for
many steps at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ctxprune.cache.page_pool import OF_A_ROW, PagePool, PoolFull, wider
from ctxprune.kernels.decode.native_path import takeable_slots
from ctxprune.kernels.decode.pages import NEVER, Slots, order_of

AHEAD = 32
"""Tokens for which a row is given room at once."""
FEW = 8
"""A row with fewer slots to take is given a page, or it would be searched too often."""


class LayerCache(PagePool):
    """One layer's pages, what its rows keep in them, and where their next tokens go. Made as PagePool is."""

    of_a_page: tuple[str, ...] = ()
    """Names of the buffers that hold something of a whole page; the others hold it of its slots."""
    plan: Slots | None = None
    taken = 0
    """Where the tokens of the coming steps go, (rows, steps), and how many of these have been taken."""
    promised = 0
    """Tokens that every row has room for, for sure (on a GPU)."""

    # Giving room.
    def make_room(self, step: Int[Tensor, " rows"], *, idle: bool = False) -> None:
        """Every row can take the token of this step. idle: some rows have none, or the next slot has to do.

        Where tokens go is decided for many steps at once and told to the attention, so that a step need not search. On
        a GPU the kernel searches by itself and no step waits; rows that idle are few, and short.
        """
        if self.looks_ahead or idle:
            self._make_room_anywhere()
            return
        if self.plan is None or self.taken == self.plan.page.shape[1]:
            self.plan, self.taken = self._planned(step), 0
        self.pages.next = Slots(self.plan.page[:, self.taken], self.plan.place[:, self.taken])
        self.taken += 1

    def _planned(self, step: Int[Tensor, " rows"]) -> Slots:
        """Slots for the next steps, (rows, steps): the rest of each row's pages, then slots of dropped keys; a page
        more for rows that have few of both."""
        slot, count = self._takeable(step)
        if bool((count < FEW).any()):
            try:
                self.give((count < FEW).long())
            except PoolFull:
                if bool((count < 1).any()):
                    raise
            else:
                slot, count = self._takeable(step)
        slot = slot[:, : min(AHEAD, int(count.min()))]
        pages = self.pages
        pages.used.copy_(torch.maximum(pages.used, slot.amax(1) + 1))
        return Slots(pages.table.gather(1, slot // pages.page).long(), slot % pages.page)

    def _takeable(self, step: Tensor) -> tuple[Int[Tensor, "rows ahead"], Int[Tensor, " rows"]]:
        """Of each row's slots along its table, the first AHEAD that were never used or else hold a dropped key (what
        follows the last of fewer means nothing), and how many such slots there are."""
        found = takeable_slots(self.pages, step, AHEAD)
        return self._searched(step) if found is None else found

    def _searched(self, step: Tensor) -> tuple[Int[Tensor, "rows ahead"], Int[Tensor, " rows"]]:
        """The same where there is no compiled kernel."""
        pages = self.pages
        place = torch.arange(pages.table.shape[1] * pages.page, device=step.device)
        used = place < pages.used[:, None]
        dropped = used & ~self._alive(torch.arange(self.rows, device=step.device), step - 1)
        behind = ~used & (place < (self.given() * pages.page)[:, None])
        rank = torch.where(behind, 0, torch.where(dropped, 1, 2))
        return rank.argsort(dim=1, stable=True)[:, :AHEAD], (rank < 2).sum(1)

    def _make_room_anywhere(self) -> None:
        """A slot that is free or a next one for every row; on a GPU for the coming steps too, since asking waits."""
        self._forget_plan()
        if self.promised > 0:
            self.promised -= 1
            return
        spare, lacking = self._lacking(ahead=self.spare_bytes is None)  # of a fixed pool others may need the rest
        if bool(lacking.any()):
            self.give(lacking.long())
            spare = spare + lacking * self.pages.page
        self.promised = max(1, int(spare.min())) - 1 if self.looks_ahead else 0

    def _lacking(self, ahead: bool = True) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
        """Slots behind each row's used ones, and which rows need a page for their next token (ahead: or, on a GPU, for
        the coming ones)."""
        pages = self.pages
        spare = self.given() * pages.page - pages.used
        return spare, spare < AHEAD if self.looks_ahead and ahead else (spare < 1) & (pages.free < 0)

    def _table_changed(self) -> None:
        super()._table_changed()
        self._forget_plan()
        self.promised = 0

    def _forget_plan(self) -> None:
        if self.plan is not None:
            self.plan = None
            self.pages.free.fill_(-1)  # known to the plan alone

    def rows_without_room(self, step: Int[Tensor, " rows"], ahead: bool = True) -> Bool[Tensor, " rows"] | None:
        """Which rows have no slot for the token of this step (ahead: as _lacking); None: it is known that all have."""
        if self.looks_ahead:
            return None if self.promised > 0 else self._lacking(ahead)[1]
        if self.plan is not None and self.taken < self.plan.page.shape[1]:
            return None
        return self._takeable(step)[1] < 1

    def make_room_for(self, tokens: Int[Tensor, " rows"]) -> None:
        """Each row can take this many more tokens in its next slots."""
        self._forget_plan()
        wanted = -(-(self.pages.used + tokens) // self.pages.page)
        self.give((wanted - self.given()).clamp(min=0))
        self.promised = 0

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
        for _, name, buffer in self.buffers():
            if name in self.of_a_page:
                continue
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
        self.take_back(back)

    def _alive(self, rows: Int[Tensor, " chosen"], step: Int[Tensor, " rows"]) -> Bool[Tensor, "chosen slots"]:
        """Which slots of these rows hold a key that lives after its row's step, along the row's table."""
        table = self.pages.table[rows].long()
        times = self.pages.drop_time[table.clamp(min=0)].masked_fill((table < 0)[..., None], 0)
        return times.flatten(1) > step[rows][:, None]

    # Rows that come and go.
    def select(self, rows: Int[Tensor, " chosen"]) -> None:
        """These rows, in this order; the pages of others are given back. A row named twice is copied."""
        whole = self.pages.table
        gone = torch.ones(len(whole), dtype=torch.bool, device=whole.device)
        gone[rows] = False
        for name in OF_A_ROW:
            setattr(self.pages, name, getattr(self.pages, name)[rows])
        self._copy_repeated(rows)
        self.take_back(whole[gone][whole[gone] >= 0].long())

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
            self.resize_for(self.in_use + len(source))
            copies = torch.arange(self.in_use, self.in_use + len(source), device=rows.device)
            for _, _, buffer in self.buffers():
                buffer[copies] = buffer[source]
            theirs[theirs >= 0] = copies.to(theirs.dtype)
            self.pages.table[again] = theirs
            self.in_use += len(source)

    def absorb(self, other: LayerCache) -> None:
        """The other's rows follow ours; their pages are copied."""
        ours, theirs = self.pages, other.pages
        if self.in_use + other.in_use > len(ours.keys):
            self._resize(self.in_use + other.in_use)  # whoever filled the other had the room
        for (_, _, buffer), (_, _, given) in zip(self.buffers(), other.buffers(), strict=True):
            buffer[self.in_use : self.in_use + other.in_use] = given[: other.in_use]
        table = torch.where(theirs.table >= 0, theirs.table + self.in_use, -1)
        most = max(ours.table.shape[1], table.shape[1])
        ours.table = torch.cat([wider(ours.table, most), wider(table, most)])
        for name in OF_A_ROW[1:]:
            setattr(ours, name, torch.cat([getattr(ours, name), getattr(theirs, name)]))
        self.in_use, self.promised = self.in_use + other.in_use, 0
        self._table_changed()

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

    def rewind(self, length: Int[Tensor, " rows"], end_of: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        """As if each row's tokens from position `length` on had never come: they are forgotten, and what they dropped
        lives again. Only where no slot was taken again since. end_of: drop times of positions of rows by themselves;
        None: none has another."""
        self._forget_plan()
        self._forget_from(length)
        if end_of is not None:
            self._live_again(length, end_of)
        self.pages.free.fill_(-1)
        self.promised = 0

    def _live_again(self, length: Int[Tensor, " rows"], end_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Keys that were dropped at `length` or later have the drop times of their positions by themselves."""
        pages, order = self.pages, self.pages.order or order_of(self.pages.table)
        times = pages.drop_time[order.pages]
        # Drop times of slots that hold nothing are 0.
        again = (times >= length.clamp(min=1)[order.row][:, None]) & (times < NEVER)
        page, place = again.nonzero(as_tuple=True)
        row = order.row[page][:, None]
        if not isinstance(order.pages, slice):
            page = order.pages[page]
        end = end_of(pages.position[page, place][:, None], row)[:, 0]
        pages.drop_time[page, place] = end.to(times.dtype)

    def _forget_from(self, length: Int[Tensor, " rows"]) -> None:
        """Empty the slots of positions from `length` on: the last that each row has taken, in order."""
        pages = self.pages
        last, end = self._last_slots(1)
        many = int((pages.position[last][:, 0].masked_fill(~end[:, 0], -1) + 1 - length).amax())
        if many > 0:
            (page, place), taken = self._last_slots(many)
            later = taken & (pages.position[page, place] >= length[:, None])
            page, place = page[later], place[later]
            pages.position[page, place], pages.drop_time[page, place] = -1, 0
            pages.used.sub_(later.sum(1))

    def _last_slots(self, many: int) -> tuple[tuple[Tensor, Tensor], Bool[Tensor, "rows many"]]:
        """Each row's last slots, the last first: their pages and places, (rows, many), and which there are."""
        pages = self.pages
        slot = pages.used[:, None].long() - torch.arange(1, many + 1, device=pages.used.device)
        there, slot = slot >= 0, slot.clamp(min=0)
        return (pages.table.gather(1, slot // pages.page).clamp(min=0).long(), slot % pages.page), there

    # What is there.
    def of_rows(self, sequences: Int[Tensor, " batch"]) -> Int[Tensor, " rows"]:
        """What belongs to a sequence, for each of its rows: one, unless KV heads decide apart."""
        return sequences if len(sequences) == self.rows else sequences.repeat_interleave(self.rows // len(sequences))

    def rows_of(self, sequences: Int[Tensor, " chosen"], batch: int) -> Int[Tensor, " rows"]:
        """The rows of these of `batch` sequences."""
        each = self.rows // batch
        return (sequences[:, None] * each + torch.arange(each, device=sequences.device)).flatten()

    def positions(self, step: Int[Tensor, " rows"]) -> list[list[int]]:
        """Of the keys alive after each row's step, rising."""
        alive = self._alive(torch.arange(self.rows, device=step.device), step)
        table = self.pages.table.long()
        position = self.pages.position[table.clamp(min=0)].flatten(1)
        return [sorted(position[row][alive[row]].tolist()) for row in range(self.rows)]
