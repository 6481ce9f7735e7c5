"""Where do the survivors live while a model generates?

In slots: what is dropped frees its slot, and the next token takes it.

The order of slots means nothing (attention is a sum), so nothing is ever moved to close a gap. True positions are kept
beside the slots. Keys are stored as the model rotated them, so RoPE stays right whatever was dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import Cache

GROWTH = 16
"""Slots added when a row is full: at least this many, or an eighth of the buffer."""
SHRINK_EVERY = 32
"""Steps between two looks at whether the buffer may shrink."""
EMPTY = -1
"""Position of a free slot."""


@dataclass
class Slots:
    """One layer's survivors. keys, values: (batch, kv_heads, slots, width); interaction: (batch, slots, rank) or None;
    position, life: (batch, slots), position EMPTY where the slot is free."""

    keys: Tensor
    values: Tensor
    interaction: Tensor | None
    position: Tensor
    life: Tensor | None
    filled: int | None = None
    """When a number: slots 0..filled-1 are live in every row and all others free, so that no mask is needed (dense)."""

    def live(self) -> Bool[Tensor, "batch slots"]:
        return self.position >= 0

    def visible(self) -> Bool[Tensor, "batch 1 1 slots"] | None:
        """What one query may read, for SDPA; None: all that `update` returned."""
        return None if self.filled is not None else self.live()[:, None, None, :]

    def each(self, change: Callable[[str, Tensor, int], Tensor]) -> Slots:
        """New slots, every buffer changed by change(name, buffer, its slot axis)."""
        return Slots(
            keys=change("keys", self.keys, 2),
            values=change("values", self.values, 2),
            interaction=None if self.interaction is None else change("interaction", self.interaction, 1),
            position=change("position", self.position, 1),
            life=None if self.life is None else change("life", self.life, 1),
        )


@dataclass
class Arrival:
    """What the wrapper decided about the tokens of this call, until the layer's keys and values arrive."""

    survives: Bool[Tensor, "batch queries"]
    interaction: Tensor | None
    position: Int[Tensor, "batch queries"]
    life: Tensor | None
    endless: bool
    """Nothing can ever be dropped: no gate and no lifetime."""


class PrunedCache(Cache):
    """A transformers cache that forgets: past_key_values of a retrofitted model; ragged over the batch.

    Only survivors are stored; `live_bytes` and `allocated_bytes` say how much. Which tokens survive is decided by the
    model's wrapped layers (ctxprune.decoding).
    """

    def __init__(self):
        self.slots: list[Slots] = []
        self.arrival: Arrival | None = None
        self.alive: Tensor | None = None
        self.seen = 0
        self.layers = []
        self.offloading = False

    # What transformers asks of a cache.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, dropped or not."""
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

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Store the survivors among the new keys and values, (batch, kv_heads, queries, width); returns what the
        attention of this call reads: all new ones at the first pass, old slots and new ones later."""
        arrival, self.arrival = self.arrival, None
        assert arrival is not None, "the wrapper decides before its layer's keys and values arrive"
        if layer_idx == len(self.slots):
            self.slots.append(_gather_survivors(key_states, value_states, arrival))
            return key_states, value_states
        slots = self.slots[layer_idx]
        if key_states.shape[2] == 1:
            return _insert_one(slots, key_states, value_states, arrival)
        read = torch.cat([slots.keys, key_states], 2), torch.cat([slots.values, value_states], 2)
        self.slots[layer_idx] = compact(_joined(slots, _gather_survivors(key_states, value_states, arrival)))
        return read

    def shrink(self) -> None:
        """Give back slots that have been free: buffers shrink to the longest row where that saves a quarter."""
        for index, slots in enumerate(self.slots):
            if slots.filled is not None:
                continue
            longest = int(slots.live().sum(1).max())
            if longest + GROWTH < 0.75 * slots.position.shape[1]:
                self.slots[index] = compact(slots)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows of the batch; the others' memory is freed."""
        for index, slots in enumerate(self.slots):
            chosen = slots.each(lambda name, buffer, axis: buffer.index_select(0, rows))
            chosen.filled = slots.filled
            self.slots[index] = chosen if slots.filled is not None else compact(chosen)

    def live_tokens(self) -> Int[Tensor, "layers batch"]:
        """Keys alive per layer and row."""
        return torch.stack([slots.live().sum(1) for slots in self.slots])

    def live_bytes(self) -> int:
        """Bytes of the live keys, values and interaction keys."""
        return sum(_bytes_per_token(slots) * int(slots.live().sum()) for slots in self.slots)

    def allocated_bytes(self) -> int:
        """Bytes of all key, value and interaction buffers, free slots included."""
        return sum(_bytes_per_token(slots) * slots.position.numel() for slots in self.slots)


def _bytes_per_token(slots: Slots) -> int:
    heads, width = slots.keys.shape[1], slots.keys.shape[3]
    numbers = 2 * heads * width + (slots.interaction.shape[-1] if slots.interaction is not None else 0)
    return numbers * slots.keys.element_size()


def _gather_survivors(keys: Tensor, values: Tensor, arrival: Arrival) -> Slots:
    """Slots that hold exactly the surviving tokens of a pass, each row's first."""
    position = torch.where(arrival.survives, arrival.position, EMPTY)
    everything = Slots(keys, values, arrival.interaction, position, arrival.life)
    if arrival.endless and bool(arrival.survives.all()):
        return replace(everything, filled=position.shape[1])
    return compact(everything)


def _reordered(slots: Slots, order: Int[Tensor, "batch kept"]) -> Slots:
    """The slots named by `order`, row by row."""

    def picked(name: str, buffer: Tensor, axis: int) -> Tensor:
        index = order.reshape(order.shape[0], *([1] * (axis - 1)), -1, *([1] * (buffer.ndim - axis - 1)))
        return torch.take_along_dim(buffer, index, dim=axis)

    return slots.each(picked)


def compact(slots: Slots) -> Slots:
    """Live slots first, free ones cut off down to the longest row."""
    live = slots.live()
    order = torch.argsort((~live).to(torch.uint8), dim=1, stable=True)
    return _reordered(slots, order[:, : max(1, int(live.sum(1).max()))])


def _joined(first: Slots, second: Slots) -> Slots:
    return first.each(lambda name, buffer, axis: torch.cat([buffer, getattr(second, name)], axis))


def _insert_one(slots: Slots, key: Tensor, value: Tensor, arrival: Arrival) -> tuple[Tensor, Tensor]:
    """Write one token per row into a free slot, growing the buffers where a row has none; returns what to read."""
    if slots.filled is not None:
        return _append_one(slots, slots.filled, key, value, arrival)
    free = ~slots.live()
    if not bool(free.any(1).all()):
        _grow(slots)
        free = ~slots.live()
    slot = free.to(torch.uint8).argmax(1)
    row = torch.arange(key.shape[0], device=key.device)
    slots.keys[row, :, slot] = key[:, :, 0]
    slots.values[row, :, slot] = value[:, :, 0]
    slots.position[row, slot] = arrival.position[:, 0]
    if arrival.interaction is not None and slots.interaction is not None:
        slots.interaction[row, slot] = arrival.interaction[:, 0]
    if arrival.life is not None and slots.life is not None:
        slots.life[row, slot] = arrival.life[:, 0]
    return slots.keys, slots.values


def _append_one(slots: Slots, column: int, key: Tensor, value: Tensor, arrival: Arrival) -> tuple[Tensor, Tensor]:
    """Nothing is ever dropped: the next column, as a plain cache would."""
    if column == slots.position.shape[1]:
        _grow(slots)
    slots.keys[:, :, column] = key[:, :, 0]
    slots.values[:, :, column] = value[:, :, 0]
    slots.position[:, column] = arrival.position[:, 0]
    slots.filled = column + 1
    return slots.keys[:, :, : column + 1], slots.values[:, :, : column + 1]


def _grow(slots: Slots) -> None:
    extra = max(GROWTH, slots.position.shape[1] // 8)

    def longer(name: str, buffer: Tensor, axis: int) -> Tensor:
        shape = list(buffer.shape)
        shape[axis] = extra
        return torch.cat([buffer, buffer.new_full(shape, EMPTY if name == "position" else 0)], axis)

    grown = slots.each(longer)
    slots.keys, slots.values, slots.position = grown.keys, grown.values, grown.position
    slots.interaction, slots.life = grown.interaction, grown.life
