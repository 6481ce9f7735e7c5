"""How much memory do a cache's layers take together, and how much may they take?"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from ctxprune.cache.layer_cache import LayerCache
from ctxprune.cache.revival import Alarm

SPARE = 0.25
"""Part of a row's pages that it may hold in vain before they are given back."""


class CacheMemory:
    """What a PrunedCache knows of its layers' pages."""

    held: list[LayerCache]
    length: Int[Tensor, " rows"] | None
    alarm: Alarm | None
    reversible: bool
    max_bytes: int | None
    peak_bytes = 0
    """Most that pages ever took at once, with those of dropped keys that an alarm keeps."""

    @property
    def lengths(self) -> Int[Tensor, " rows"]:
        """Positions each row has seen."""
        assert self.length is not None, "nothing has been cached yet"
        return self.length

    @property
    def last(self) -> Int[Tensor, " rows"]:
        """Position of each row's last token: the step whose survivors are alive."""
        return self.lengths - 1

    def shrink(self, spare: float = SPARE) -> None:
        """Give back pages that dropped keys have left empty, in rows that hold more than that part of theirs in
        vain."""
        if not self.reversible:
            for layer in self.held:
                layer.compact(layer.of_rows(self.last), spare)

    def live_bytes(self) -> int:
        """Bytes of the live keys, values and interaction keys, and of what a ranking keeps."""
        live = [int(layer.pages.live(layer.of_rows(self.last)).sum()) for layer in self.held]
        return sum(one.bytes_per_token() * keys + one.row_bytes() for one, keys in zip(self.held, live, strict=True))

    def _cold(self) -> Sequence[LayerCache]:
        return [] if self.alarm is None else self.alarm.cold

    # A pool of fixed size.
    def spare_bytes(self) -> int:
        """How many more the layers may take together."""
        return max(0, (self.max_bytes or 0) - self.allocated_bytes())

    def make_room(self) -> bool:
        """Give every row the page that its next token needs in some layer; False, and none, where there are too few."""
        if self.max_bytes is None:
            return True
        # On a GPU for the coming steps too, if there is enough; at last, pages that rows hold in vain are given back.
        for ahead, shrunk in ((True, False), (False, False), (False, True)):
            if shrunk:
                self.shrink(0.0)
            if not ahead:
                self.trim()
            lacking = [(layer, layer.rows_without_room(layer.of_rows(self.lengths), ahead)) for layer in self.held]
            wanted = [(layer, rows.long()) for layer, rows in lacking if rows is not None and bool(rows.any())]
            growth = sum(layer.growth_for(int(rows.sum())) * layer.page_bytes() for layer, rows in wanted)
            if growth <= self.spare_bytes():
                for layer, rows in wanted:
                    layer.give(rows, exact=True)
                return True
        return False

    def trim(self) -> None:
        """No page that no row has."""
        for layer in self.held:
            layer.trim()

    def used_bytes(self) -> int:
        """Bytes of the pages that rows have, free slots included."""
        return sum(layer.used_bytes() for layer in self.held)

    def allocated_bytes(self) -> int:
        """Bytes of all pages, free slots and the slots' integers included."""
        return sum(layer.allocated_bytes() for layer in self.held)

    def held_bytes(self) -> int:
        """The same, and what an alarm keeps of dropped keys."""
        return self.allocated_bytes() + sum(layer.allocated_bytes() for layer in self._cold())

    def _grew(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.held_bytes())
