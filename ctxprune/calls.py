"""What does a wrapped layer tell the attention function?

One of three calls, or None where nothing is dropped and the model's own attention runs unchanged. And the state the
layers share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ctxprune import kernels
from ctxprune.cache.capping import enforce
from ctxprune.cache.cold_store import archive
from ctxprune.cache.layer_cache import LayerCache
from ctxprune.cache.pruned_cache import SPARE, PrunedCache
from ctxprune.cache.revival import attend_again, revive
from ctxprune.policies import PolicyConfig
from ctxprune.ranked_calls import Decisions
from ctxprune.visibility import Layout, guards

Mode = Literal["auto", "soft", "hard", "dense"]


@dataclass
class PruningState:
    """What the layers of one retrofitted model share."""

    policy: PolicyConfig
    """What the model was retrofitted with."""
    layers: int
    """Wrapped attention layers."""
    alpha: float = 8.0
    """Sharpness of the soft gates."""
    mode: Mode = "auto"
    """auto: soft while training, the step function otherwise; dense: gates are bypassed (the unpruned teacher)."""
    record: dict[int, Tensor] | None = None
    """When a dict: each layer leaves the drop times of its forward pass here, (batch, n)."""
    survival: dict[int, Tensor] = field(default_factory=dict)
    """By layer, the mean of I over the visible pairs of the last soft forward pass (with its gradient)."""
    prompt: Tensor | None = None
    """(batch,) column at which each row's prompt is over, for policies that drop there, in a pass over whole rows."""
    ids: Tensor | None = None
    """Token ids of the call in flight, (batch, n); None where the model was given embeddings."""
    positions: Tensor | None = None
    """Positions that the model was given in it, for layers that are not told."""
    replay: Callable[[int, Tensor], Attends] | None = None
    """(layer, hidden) -> the call that its attention makes instead of its own (ctxprune.replay)."""
    decisions: Decisions | None = None
    """Where layers add up what ranking costs; None: nowhere."""
    plan: Layout | None = None
    """Documents of the batch in flight, found by the first layer."""
    graphs: bool = True
    """Whether decoding steps on a GPU may be captured; False once one could not be."""
    inherited: dict[int, Tensor] = field(default_factory=dict)
    """With propagate_in_depth: log I or drop times of each layer, by its index, for the one below. All are kept, as
    activation checkpointing runs the layers again from the last to the first."""

    @property
    def propagate_in_depth(self) -> bool:
        """A key dropped in one layer is gone in every deeper one."""
        return getattr(self.policy, "propagate_in_depth", False)

    def guards(
        self, position: Int[Tensor, "batch n"], pinned: Bool[Tensor, "batch n"] | None = None
    ) -> Int[Tensor, "batch n"] | None:
        """First row whose gate may drop each key, given its position in its document; None when that is the next."""
        return guards(position, self.policy.sinks, self.policy.recent, pinned)

    @property
    def documents(self) -> Layout:
        """`plan`, once the first layer has run."""
        assert self.plan is not None, "no forward pass has found the documents yet"
        return self.plan

    def recorded(self) -> Tensor:
        """The drop times in `record`, (layers, batch, n)."""
        assert self.record is not None, "nothing was asked to be recorded"
        return torch.stack([self.record[layer] for layer in range(self.layers)])


@runtime_checkable
class Attends(Protocol):
    """A call that knows how to attend: over a cache, under a ranking, or beside what was read before."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query (batch, heads, n, width), key, value (batch, kv_heads, n, width) -> (batch, heads, n, width)."""
        ...


@dataclass
class Soft:
    """Trainable pruning of one call: gate inputs and who may be dropped when."""

    interaction_query: Tensor
    interaction_key: Tensor
    beta: Tensor
    alpha: float
    guard: Tensor | None
    end: Tensor
    state: PruningState


@dataclass
class Hard:
    """Drop times of one call, (batch, n)."""

    drop_time: Tensor


@dataclass
class Cached:
    """Attention of new tokens (`cache.new`) over what a layer's cache holds, which takes them in.

    gates: interaction query, key (batch, n, rank) and beta, or None; drop_time: (batch, n) int32, of the tokens by
    themselves; None: never; in_depth: what a layer drops is dropped in those below.
    """

    cache: PrunedCache
    index: int
    gates: tuple[Tensor, Tensor, Tensor] | None
    drop_time: Int[Tensor, "batch n"] | None
    in_depth: bool = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query (batch, heads, n, width) -> (batch, heads, n, width)."""
        cache, layer, new, n = self.cache, self.cache.held[self.index], self.cache.new, query.shape[2]
        if self.in_depth and self.index > 0:
            times = cache.held[self.index - 1].times()
            layer.inherit(times)
            own = times.gather(1, new.step.clamp(min=0).long())
            self.drop_time = own if self.drop_time is None else torch.minimum(self.drop_time, own)
        if n == 1:
            return self._one(layer, query, key, value, scale, 0)
        if cache.max_live_tokens is not None:
            return torch.cat([self._one(layer, query, key, value, scale, i) for i in range(n)], 2)
        layer.make_room_for((new.step >= 0).sum(1))
        gate_query, gate_key, beta = self.gates or (None, None, None)
        drop_time = new.never if self.drop_time is None else self.drop_time
        output = kernels.extend_attention(
            query, key, value, gate_query, gate_key, beta, new.step, layer.pages,
            guard=new.guard, drop_time=drop_time, scale=scale,
        )  # fmt: skip
        if cache.alarm is not None:
            archive(layer, cache.alarm.store_of(self.index, layer), (new.length - 1).int())
        if not (self.in_depth or cache.reversible):
            # Only one layer at a time holds what a chunk brought and dropped (in depth those below must know of it).
            layer.compact(new.length - 1, SPARE)
        return output

    def _one(self, layer: LayerCache, query: Tensor, key: Tensor, value: Tensor, scale: float, i: int) -> Tensor:
        """Token i alone: (batch, heads, 1, width)."""
        cache, new = self.cache, self.cache.new
        gate_query, gate_key, beta = self.gates or (None, None, None)
        if gate_query is not None and gate_key is not None:
            gate_query, gate_key = gate_query[:, i], gate_key[:, i]
        if new.step.shape[1] == 1:
            step, guard, drop_time = new.single
        else:
            step, guard, drop_time = new.step[:, i], new.guard[:, i], new.never[:, i]
        if self.drop_time is not None:
            drop_time = self.drop_time[:, i]
        if cache.max_live_tokens is not None:
            enforce(layer, gate_query, beta, step, cache.max_live_tokens)
        # Slots of dropped keys may have to come back, or tell the layer below what went while a chunk was read.
        held = cache.reversible or (self.in_depth and new.step.shape[1] > 1)
        if held:
            layer.pages.free.fill_(-1)
        # Slots that are planned ahead would be planned anew whenever tokens are taken back.
        layer.make_room(step, idle=new.real is not None or held)
        now = query[:, :, i]
        output = kernels.decode_attention(
            now, key[:, :, i], value[:, :, i], gate_query, gate_key, beta, step, layer.pages,
            guard=guard, drop_time=drop_time, scale=scale, check=False,
        )  # fmt: skip
        if cache.alarm is not None:
            cold = cache.alarm.store_of(self.index, layer)
            archive(layer, cold, step)
            if revive(cache.alarm, layer, cold, now, step, scale):
                output = attend_again(layer, now, step, scale)
        return output[:, :, None]
