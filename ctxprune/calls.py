"""What does a wrapped layer tell the attention function? One of three calls, and the state the layers share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ctxprune.cache import Slots
from ctxprune.visibility import Layout

Mode = Literal["auto", "soft", "hard", "dense"]


@dataclass
class PruningState:
    """What the layers of one retrofitted model share."""

    alpha: float = 8.0
    """Sharpness of the soft gates."""
    mode: Mode = "auto"
    """auto: soft while training, the step function otherwise; dense: gates are bypassed (the unpruned teacher)."""
    propagate_in_depth: bool = False
    sinks: int = 0
    recent: int = 0
    record: list[Tensor] | None = None
    """When a list: each layer appends the drop times of its forward pass, (batch, n)."""
    survival: list[Tensor | None] = field(default_factory=list)
    """Per layer, the mean of I over the visible pairs of the last soft forward pass (with its gradient)."""
    plan: Layout | None = None
    """Documents of the batch in flight, found by the first layer."""
    inherited: dict[int, Tensor] = field(default_factory=dict)
    """With propagate_in_depth: log I or drop times of each layer, by its index, for the one below. All are kept, as
    activation checkpointing runs the layers again from the last to the first."""


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
    """Drop times of one call; None: nothing is dropped, the model's own attention runs unchanged."""

    drop_time: Tensor | None


@dataclass
class Cached:
    """Attention over a pruned cache. One new token: over the live slots (read after it has taken its own); several:
    `visible`, (batch, 1, queries, old slots + new tokens), True where a query sees a key."""

    slots: Slots
    visible: Tensor | None = None
