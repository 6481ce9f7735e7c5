"""What does transformers hold while a retrofitted model generates? A cache that forgets, one LayerCache per layer.

True positions are kept apart from slots, and keys are stored as the model rotated them, so RoPE stays right whatever
was dropped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import Cache

from ctxprune.cache.cold_store import archive
from ctxprune.cache.layer_cache import LayerCache
from ctxprune.cache.memory import SPARE, CacheMemory
from ctxprune.cache.new_tokens import Arrival, NewTokens
from ctxprune.cache.page_pool import PoolFull
from ctxprune.cache.pinning import each_row, stacked
from ctxprune.cache.revival import Alarm
from ctxprune.errors import UserError

SHRINK_EVERY = 32
"""Steps between two looks at whether pages can be given back."""


class PrunedCache(CacheMemory, Cache):
    """A transformers cache that forgets: past_key_values of a retrofitted model; ragged over the batch.

    Only survivors are stored; `live_bytes` and `allocated_bytes` say how much. Which tokens survive is decided by the
    model's wrapped layers (ctxprune.decoding).
    """

    def __init__(
        self,
        *,
        page: int = 64,
        max_live_tokens: int | None = None,
        pinned: Bool[Tensor, "rows positions"] | None = None,
        reversible: bool = False,
        max_bytes: int | None = None,
        alarm: Alarm | None = None,
    ):
        """page: slots per page (16, 32, 64 or 128). max_live_tokens: keys per row and layer, the newest included, that
        are never exceeded; the policy's own ranking says who goes. pinned: positions that nothing ever drops.
        reversible: keep what is needed for `crop` (dropped keys keep their slots until then). max_bytes: of all pages
        together; what would take more raises page_pool.PoolFull. alarm: bring dropped keys back where a query may need
        them (its own counters are raised).

        Raises UserError for a page size or cap out of range.
        """
        if page not in (16, 32, 64, 128):
            raise UserError(f"page is {page}: choose 16, 32, 64 or 128 slots")
        if max_live_tokens is not None and max_live_tokens < 1:
            raise UserError(f"max_live_tokens is {max_live_tokens}: give at least 1")
        if alarm is not None and (max_live_tokens is not None or reversible or max_bytes is not None):
            raise UserError("an alarm brings keys back: it goes with no cap, no fixed pool and no reversible cache")
        self.alarm = alarm
        if alarm is not None:
            alarm.cold = []
        self.held: list[LayerCache] = []
        self.length: Tensor | None = None
        """(rows,) positions each row has seen: that of its next token."""
        self.seen, self.page, self.max_live_tokens = 0, page, max_live_tokens
        self.reversible, self.pinned, self.max_bytes = reversible, pinned, max_bytes
        self.prompt: Tensor | None = None
        """(rows,) positions of each row's prompt, for policies that drop at its end: by default the first pass."""
        self.reading = True
        """Whether some row's prompt goes on."""
        self.incoming: NewTokens | None = None
        self.arrival: Arrival | None = None
        self.end_of: list[Callable[[Tensor, Tensor], Tensor]] = []
        """By layer: drop times of positions of rows by themselves, whatever gates say."""
        self.endless: list[bool] = []
        """By layer: whether they are never."""
        self.expected: Tensor | None = None
        """(rows,) positions that each row will have and keep, if that is known before the first: their pages are taken
        at once."""
        self.layers, self.offloading = [], False

    # What transformers asks of a cache.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included, dropped or not."""
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return self.reversible

    @property
    def batch_size(self) -> int:
        return len(self.lengths) if self.held else -1

    def __len__(self) -> int:
        return len(self.held)

    def activate_past_recording(self) -> None:
        """transformers is going to crop this cache. UserError under an alarm, which cannot take tokens back."""
        if self.alarm is not None:
            raise UserError("assisted decoding takes tokens back, an alarm brings keys back: leave one of them out")
        self.reversible = True

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Keys and values, (batch, kv_heads, n, width), of a first pass are stored here, as far as they survive; those
        of later passes by the attention itself (ctxprune.calls.Cached). Returns them as they are."""
        arrival, self.arrival = self.arrival, None
        if arrival is not None:
            if key_states.shape != value_states.shape:
                raise UserError("keys and values of different widths cannot be cached in pages")
            rank = None if arrival.interaction is None else arrival.interaction.shape[-1]
            batch, kv_heads, _, width = key_states.shape
            dtype, device = key_states.dtype, key_states.device
            layer = LayerCache(
                batch, kv_heads=kv_heads, width=width, rank=rank, page=self.page, dtype=dtype, device=device
            )
            self.hold(layer)
            layer.make_room_for((arrival.step >= 0).sum(1))
            layer.pages.store(
                key_states, value_states, arrival.interaction, arrival.step, arrival.guard, arrival.drop_time
            )
            if self.alarm is not None:
                archive(layer, self.alarm.store_of(layer_idx, layer), (self.new.length - 1).int())
        return key_states, value_states

    def hold(self, layer: LayerCache) -> None:
        """The next layer's keys are kept in this one."""
        if self.max_bytes is not None:
            if self.allocated_bytes() + layer.allocated_bytes() > self.max_bytes:
                raise PoolFull
            layer.spare_bytes = self.spare_bytes
        layer.grew = self._grew
        if self.expected is not None:
            layer.reserve(int((-(-self.expected // self.page)).sum()))
        self.held.append(layer)
        self._grew()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens of every row as if they had never come (assisted decoding); what
        stays is final. Raises UserError if the cache is not reversible."""
        if not self.reversible:
            raise UserError("this cache cannot take tokens back: make it with ctxprune.PrunedCache(reversible=True)")
        if tokens_to_remove > 0:
            raise UserError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        removed = -tokens_to_remove
        if self.length is not None:
            self.rewind(self.length - removed)
        self.seen -= removed

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything."""
        if self.alarm is not None:
            self.alarm.cold = []
        self.held, self.end_of, self.endless, self.length, self.seen = [], [], [], None, 0
        self.prompt, self.reading = None, True

    # What generation asks of it.
    @property
    def new(self) -> NewTokens:
        """The tokens of the call in flight."""
        assert self.incoming is not None, "the first layer tells the others"
        return self.incoming

    @new.setter
    def new(self, tokens: NewTokens) -> None:
        self.incoming = tokens

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """These rows of the batch, in this order; the others' memory is freed."""
        if self.length is None:
            return
        rows = rows.to(self.length.device)
        for layer in [*self.held, *self._cold()]:
            layer.select(layer.rows_of(rows, len(self.length)))
        self.length = self.length[rows]
        self.prompt = None if self.prompt is None else self.prompt[rows]
        self.pinned = None if self.pinned is None else self.pinned[rows.to(self.pinned.device)]

    def absorb(self, other: PrunedCache) -> None:
        """The other's rows follow ours (requests that join a running batch); the other must not be used again."""
        mine = each_row(self.pinned, max(0, self.batch_size))
        self.pinned = stacked([*mine, *each_row(other.pinned, other.batch_size)])
        if not self.held:
            self.held, self.length = other.held, other.length
            self.end_of, self.endless = other.end_of, other.endless
            if self.alarm is not None and other.alarm is not None:
                self.alarm.cold = other.alarm.cold
            for layer in self.held:
                layer.spare_bytes = None if self.max_bytes is None else self.spare_bytes
            for layer in [*self.held, *self._cold()]:
                layer.grew = self._grew
        else:
            for ours, theirs in zip([*self.held, *self._cold()], [*other.held, *other._cold()], strict=True):
                ours.absorb(theirs)
                theirs.pages = ours.pages  # their own are free to go
            self.length = torch.cat([self.lengths, other.lengths])
        if other.prompt is not None:
            self.prompt = other.prompt if self.prompt is None else torch.cat([self.prompt, other.prompt])
        self.seen = max(self.seen, other.seen)
        other.held = []  # ours now: what knows of the other must not keep their pages alive

    def rewind(self, length: Int[Tensor, " rows"]) -> None:
        """Every row as it was when its next position was `length`; what it held then is final from now on."""
        for layer, end_of, endless in zip(self.held, self.end_of, self.endless, strict=True):
            # Elsewhere positions alone drop, and they would say the same again.
            decided = layer.gated or self.max_live_tokens is not None
            layer.rewind(length, end_of if decided else None)
            if decided or not endless:
                layer.compact(length - 1, SPARE)
        self.length = length

    def positions(self) -> list[list[list[int]]]:
        """By layer and row, the positions of the keys alive, rising (by KV head after KV head of each row, where heads
        decide apart)."""
        return [layer.positions(layer.of_rows(self.last)) for layer in self.held]

    def live_tokens(self) -> Int[Tensor, "layers batch"]:
        """Keys alive per layer and row (where heads decide apart, of the head that has most)."""
        live = [layer.pages.live(layer.of_rows(self.last)).view(len(self.last), -1).amax(1) for layer in self.held]
        return torch.stack(live)
