"""Which keys does a decoding step drop? The same rule as over whole rows, asked one call at a time.

`decide` runs before the layer's own keys exist: it marks dropped slots free (a drop acts at once, for the very query
that decided it) and says which of the new tokens will be stored. Offline drop times and these steps agree exactly.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor

import kernels
from ctxprune.cache import EMPTY, Arrival, PrunedCache, Slots
from ctxprune.calls import Cached, Hard
from ctxprune.errors import UserError
from ctxprune.visibility import ends, layout


def decide(
    cache: PrunedCache, wrapper, hidden: Tensor, position_ids: Tensor | None, padding: Tensor | None
) -> Hard | Cached | None:
    """Drops of one layer for the new tokens hidden, (batch, queries, width), and what the attention may read.

    position_ids: (rows, queries) true positions, by default those that follow; padding: (batch, tokens), True at real
    tokens, honoured in the first call only (pad prompts on the left).
    """
    if position_ids is None:
        position_ids = torch.arange(cache.seen, cache.seen + hidden.shape[1], device=hidden.device)[None]
    position = position_ids.expand(hidden.shape[0], -1)
    last = wrapper.layer_idx == wrapper.state.layers - 1
    call: Hard | Cached | None
    if wrapper.layer_idx >= len(cache.slots):
        call = _first_pass(cache, wrapper, hidden, position, padding)
    else:
        call = _later_pass(cache, wrapper, hidden, position)
    if last:
        cache.seen += hidden.shape[1]
    return call


def _first_pass(cache: PrunedCache, wrapper, hidden: Tensor, position: Tensor, padding: Tensor | None) -> Hard | None:
    """The prompt: drop times over whole rows; whoever outlives the last query is stored."""
    n = hidden.shape[1]
    plan = layout(hidden.shape[:2], position, padding, hidden.device)
    life = wrapper.lifetime(position)
    drop_time, interaction = ends(plan, life), None
    if wrapper.gate is not None:
        query, interaction, beta = wrapper.gate(hidden)
        guard = wrapper.state.guards(position)
        drop_time = wrapper.inherit(kernels.drop_times(query, interaction, beta, guard=guard, end=drop_time))
    survives = drop_time >= n
    if padding is not None:
        survives &= padding.to(torch.bool)[:, -n:]
    endless = wrapper.gate is None and life is None
    cache.arrival = Arrival(survives, interaction, position, life, endless)
    return Hard(drop_time) if bool((drop_time < n).any()) else None


def _later_pass(cache: PrunedCache, wrapper, hidden: Tensor, position: Tensor) -> Cached:
    """More tokens on top of the survivors: each new query may drop old slots and earlier new tokens."""
    slots, n = cache.slots[wrapper.layer_idx], hidden.shape[1]
    life = wrapper.lifetime(position)
    gates = wrapper.gate(hidden) if wrapper.gate is not None else None
    if (gates is None) != (slots.interaction is None):
        raise UserError("this cache was filled in another mode (hard or dense): start again with a new PrunedCache()")
    if slots.filled is not None and gates is None and life is None and n == 1:
        cache.arrival = Arrival(torch.ones_like(position, dtype=torch.bool), None, position, None, True)
        return Cached(slots)
    seen_old = _visible_slots(slots, wrapper, position, gates)
    if wrapper.state.propagate_in_depth:
        if wrapper.layer_idx > 0:
            seen_old &= _seen_above(cache, slots)
        _remember_seen(cache, slots, position, seen_old)
    slots.position = torch.where(seen_old[:, -1], slots.position, EMPTY)
    slots.filled = None
    interaction = gates[1] if gates is not None else None
    if n == 1:
        drop_time, visible = position.new_full(position.shape, 1), None
    else:
        drop_time = ends(layout(position.shape, None, None, position.device), life)
        if gates is not None:
            guard = wrapper.state.guards(position)
            drop_time = wrapper.inherit(kernels.drop_times(*gates, guard=guard, end=drop_time))
        row = torch.arange(n, device=position.device)[:, None]
        seen_new = (row >= row.T) & (row < drop_time[:, None, :])
        visible = torch.cat([seen_old, seen_new], dim=2)[:, None]
    cache.arrival = Arrival(drop_time >= n, interaction, position, life, False)
    return Cached(slots, visible)


def _visible_slots(
    slots: Slots, wrapper, position: Int[Tensor, "batch queries"], gates: tuple | None
) -> Bool[Tensor, "batch queries slots"]:
    """Which old slots each new query sees: alive, not too old, and dropped by neither it nor a query before it."""
    age = position[:, :, None] - slots.position[:, None, :]
    gone = torch.zeros_like(age, dtype=torch.bool) if slots.life is None else age >= slots.life[:, None, :]
    if gates is not None:
        query, _, beta = gates
        assert slots.interaction is not None, "a gated layer keeps interaction keys"
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        x = torch.baddbmm(
            beta.to(work),
            query.to(work),
            slots.interaction.to(work).transpose(1, 2),
            alpha=1.0 / math.sqrt(query.shape[-1]),
        )
        dropping = x <= 0
        sinks, recent = wrapper.state.policy.sinks, wrapper.state.policy.recent
        if sinks:
            dropping &= slots.position[:, None, :] >= sinks
        if recent:
            dropping &= age > recent
        gone |= dropping
    if gone.shape[1] > 1:
        gone = gone.cummax(dim=1).values
    return ~gone & slots.live()[:, None, :]


def _seen_above(cache: PrunedCache, slots: Slots) -> Bool[Tensor, "batch queries slots"]:
    """propagate_in_depth: which of this layer's keys each new query still sees in the layer above."""
    assert cache.alive is not None, "the layer above has left what it sees"
    place = slots.position.clamp(min=0)[:, None, :]
    return cache.alive.gather(2, place.expand(-1, cache.alive.shape[1], -1))


def _remember_seen(
    cache: PrunedCache,
    slots: Slots,
    position: Int[Tensor, "batch queries"],
    seen: Bool[Tensor, "batch queries slots"],
) -> None:
    """For the layer below: True at every earlier position that each new query sees here."""
    beyond = int(position.max()) + 1
    alive = torch.zeros(*seen.shape[:2], beyond + 1, dtype=torch.bool, device=seen.device)
    # Free slots write to a place of their own, behind all positions.
    place = torch.where(slots.live(), slots.position, beyond)[:, None, :]
    cache.alive = alive.scatter(2, place.expand_as(seen), seen)
