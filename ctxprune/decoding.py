"""Which keys does a decoding step drop? The same rule as over whole rows, asked one call at a time.

`decide` runs before the layer's own keys exist. A first pass takes drop times over whole rows, as training and
evaluation do; later ones hand the gates to the attention over the cache, which drops and attends at once. Offline drop
times and these steps agree exactly.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune import kernels, ranked_calls
from ctxprune.cache.new_tokens import Arrival, NewTokens
from ctxprune.cache.pinning import pinned_at
from ctxprune.cache.pruned_cache import PrunedCache
from ctxprune.calls import Cached, Hard
from ctxprune.errors import UserError
from ctxprune.kernels.decode.pages import NEVER
from ctxprune.policies.rule import FOREVER
from ctxprune.ranked_calls import CachedRanked, goes_on
from ctxprune.visibility import Layout, ends, layout


def decide(
    cache: PrunedCache, wrapper, hidden: Tensor, position_ids: Tensor | None, padding: Tensor | None
) -> Hard | Cached | CachedRanked | None:
    """Drops of one layer for the new tokens hidden, (batch, n, width), and what the attention may read.

    position_ids: (rows, n) true positions, by default those that follow; padding: (batch, tokens), True at real tokens,
    of which the last n columns are these. A row's real tokens stand together.
    """
    if wrapper.layer_idx == 0:
        cache.new = _new_tokens(cache, wrapper, hidden, position_ids, padding)
        if wrapper.ranking is not None:
            ranked_calls.refuse(cache)
            _look_for_the_prompts_end(cache)
    new = cache.new
    if cache.alarm is not None:
        if wrapper.state.propagate_in_depth:
            raise UserError("an alarm does not go with propagate_in_depth: what came back would be dropped from above")
        if wrapper.window is not None:
            raise UserError("an alarm does not go with a model's own sliding window: keys outside would come back")
    gate = wrapper.gate
    gates = None if gate is None else gate(hidden)
    first, drop_time = wrapper.layer_idx >= len(cache.held), None
    if first or not cache.endless[wrapper.layer_idx]:
        drop_time = _end(wrapper, new.position, new.pinned)
    if first:
        cache.end_of.append(partial(_end_of_stored, cache, wrapper))
        cache.endless.append(drop_time is None)
    call: Hard | Cached | CachedRanked | None
    if wrapper.ranking is not None and (cache.reading or goes_on(wrapper.ranking.config)):
        call = _ranked(cache, wrapper, hidden, new.never if drop_time is None else drop_time)
    elif first and (cache.max_live_tokens is None or hidden.shape[1] <= cache.max_live_tokens):
        call = _first_pass(cache, wrapper, gates, drop_time)
    else:
        call = _later_pass(cache, wrapper, gates, drop_time)
    if wrapper.layer_idx == wrapper.state.layers - 1:
        cache.seen += hidden.shape[1]
        cache.length = new.length
    return call


def _look_for_the_prompts_end(cache: PrunedCache) -> None:
    """Whether these tokens are of prompts: asked once for all layers, and no more once they are over."""
    new = cache.new
    if cache.prompt is None:
        cache.prompt = new.length
    elif cache.length is None:
        cache.prompt = cache.prompt.to(new.length.device)
    if cache.reading and cache.length is not None:
        cache.reading = bool((cache.prompt > cache.length).any())


def _ranked(cache: PrunedCache, wrapper, hidden: Tensor, end: Tensor) -> CachedRanked:
    """The call of a policy that ranks: it decides once queries and keys are there."""
    new, state = cache.new, wrapper.state
    return CachedRanked(
        wrapper.ranking, hidden, state.ids, new.position, new.step, end, new.guard == NEVER, cache.prompt,
        state.decisions, wrapper.layer_idx, None, cache,
    )  # fmt: skip


def _new_tokens(
    cache: PrunedCache, wrapper, hidden: Tensor, position_ids: Tensor | None, padding: Tensor | None
) -> NewTokens:
    """What the layers share."""
    batch, n, device = hidden.shape[0], hidden.shape[1], hidden.device
    real = None if padding is None else padding[:, -n:].to(torch.bool)
    if real is not None and bool(real.all()):
        real = None
    position = _positions(cache, batch, n, position_ids, real, device)
    cache.pinned = None if cache.pinned is None else cache.pinned.to(device)
    step = position if real is None else position.masked_fill(~real, -1)
    length = step.amax(1) + 1
    if cache.length is not None:
        length = torch.maximum(length, cache.length)
    pinned, policy = (
        pinned_at(cache.pinned, position, torch.arange(batch, device=device)[:, None]),
        wrapper.state.policy,
    )
    protected = position < policy.sinks if pinned is None else (position < policy.sinks) | pinned
    guard = torch.where(protected, NEVER, position + 1 + policy.recent)
    never = torch.full(position.shape, NEVER, dtype=torch.int32, device=device)
    return NewTokens(position, real, step.to(torch.int32), guard.to(torch.int32), never, pinned, length)


def _positions(
    cache: PrunedCache, batch: int, n: int, given: Tensor | None, real: Tensor | None, device: torch.device
) -> Int[Tensor, "batch n"]:
    """True positions of the new tokens."""
    if given is not None:
        given = given.expand(batch, -1)
        if real is not None and cache.length is None:
            first = given.gather(1, real.long().argmax(1, keepdim=True))
            if bool((first[~real[:, 0]] > 0).any()):
                raise UserError(
                    "padding on the left is counted as text: pass position_ids=(attention_mask.cumsum(-1) - 1)"
                    ".clamp(min=0), here and for every later token, or use ctxprune.generate"
                )
        return given
    before = 0 if cache.length is None else cache.length[:, None]
    if real is None:
        return (before + torch.arange(n, device=device)).expand(batch, -1)
    return before + (real.cumsum(1) - 1).clamp(min=0)


def _end(wrapper, position: Tensor, pinned: Tensor | None) -> Tensor | None:
    """Drop time of each token by its position alone, whatever gates say; None: never."""
    life = wrapper.lifetime(position, pinned)
    return None if life is None else torch.where(life >= FOREVER, NEVER, position + life).to(torch.int32)


def _end_of_stored(cache: PrunedCache, wrapper, position: Tensor, row: Tensor) -> Tensor:
    """The same of positions that are stored for these rows."""
    end = _end(wrapper, position, pinned_at(cache.pinned, position, row))
    return torch.full_like(position, NEVER) if end is None else end


def _first_pass(
    cache: PrunedCache, wrapper, gates: tuple[Tensor, Tensor, Tensor] | None, drop_time: Tensor | None
) -> Hard | None:
    """The prompt: drop times over whole rows; whoever outlives the row's last query is stored."""
    new = cache.new
    position, n = new.position, new.position.shape[1]
    plan = layout(position.shape, position, new.real, position.device)
    row = ends(plan, wrapper.lifetime(position, new.pinned))
    if gates is not None:
        guards = wrapper.state.guards(position, new.pinned)
        row = wrapper.inherit(kernels.drop_times(*gates, guard=guards, end=row))
    last = _last_end(plan, new.real)
    drop_time = new.never if drop_time is None else drop_time
    if cache.reversible or cache.alarm is not None:
        # All are kept, with the position of the query that dropped them.
        dropped = position.gather(1, row.clamp(max=n - 1)).to(torch.int32)
        drop_time = torch.where(row < last, torch.minimum(dropped, drop_time), drop_time)
        stored = plan.end == last
    else:
        stored = row >= last
    if new.real is not None:
        stored &= new.real
    interaction = gates[1] if gates is not None else None
    cache.arrival = Arrival(interaction, new.step.masked_fill(~stored, -1), new.guard, drop_time)
    return Hard(row) if bool((row < n).any()) else None


def _last_end(plan: Layout, real: Tensor | None) -> Int[Tensor, "batch 1"]:
    """Where each row's last document ends; 0 for rows of padding alone."""
    if real is None:
        return plan.end[:, -1:]
    return plan.end.masked_fill(~real, 0).amax(1, keepdim=True)


def _later_pass(
    cache: PrunedCache, wrapper, gates: tuple[Tensor, Tensor, Tensor] | None, drop_time: Tensor | None
) -> Cached:
    """More tokens on top of the survivors."""
    new, index = cache.new, wrapper.layer_idx
    if index >= len(cache.held):  # a prompt longer than the cap: nothing is stored yet
        interaction = gates[1] if gates is not None else None
        cache.arrival = Arrival(interaction, torch.full_like(new.step, -1), new.guard, new.never)
    elif (gates is not None) != cache.held[index].gated:
        raise UserError("this cache was filled in another mode (hard or dense): start again with a new PrunedCache()")
    return Cached(cache, index, gates, drop_time, wrapper.state.propagate_in_depth and gates is not None)
