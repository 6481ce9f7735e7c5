"""What does a wrapped layer tell the attention function?

One of three calls, or None where nothing is dropped and the model's own attention runs unchanged. And the state the
layers share.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune.cache import Slots
from ctxprune.policies import PolicyConfig
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
    plan: Layout | None = None
    """Documents of the batch in flight, found by the first layer."""
    inherited: dict[int, Tensor] = field(default_factory=dict)
    """With propagate_in_depth: log I or drop times of each layer, by its index, for the one below. All are kept, as
    activation checkpointing runs the layers again from the last to the first."""

    @property
    def propagate_in_depth(self) -> bool:
        """A key dropped in one layer is gone in every deeper one."""
        return getattr(self.policy, "propagate_in_depth", False)

    def guards(self, position: Int[Tensor, "batch n"]) -> Int[Tensor, "batch n"] | None:
        """First row whose gate may drop each key, given its position in its document; None when that is the next."""
        return guards(position, self.policy.sinks, self.policy.recent)

    @property
    def documents(self) -> Layout:
        """`plan`, once the first layer has run."""
        assert self.plan is not None, "no forward pass has found the documents yet"
        return self.plan

    def recorded(self) -> Tensor:
        """The drop times in `record`, (layers, batch, n)."""
        assert self.record is not None, "nothing was asked to be recorded"
        return torch.stack([self.record[layer] for layer in range(self.layers)])


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
    """Attention over a pruned cache. One new token: over the live slots (read after it has taken its own); several:
    `visible`, (batch, 1, queries, old slots + new tokens), True where a query sees a key."""

    slots: Slots
    visible: Tensor | None = None
