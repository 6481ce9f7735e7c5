"""What is a method? One way to read prompts and write on, whose cache can be weighed."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Method(Protocol):
    """One batch of prompts in one engine. Greedy, and no token ends a row."""

    @abstractmethod
    def read(self) -> float:
        """Read the prompts into a new cache and pick the first tokens: seconds."""

    @abstractmethod
    def steps(self, count: int) -> list[float]:
        """Write `count` tokens more per row: seconds of each step that was like all others."""

    @abstractmethod
    def text(self) -> Tensor:
        """(batch, n): the prompts and all that has been written."""

    @abstractmethod
    def cache_bytes(self) -> tuple[int, int]:
        """Bytes of what a step has to read of the cache, and of all that it holds."""

    @abstractmethod
    def live_share(self) -> float:
        """Share of the tokens seen whose keys are still there, mean over layers and rows."""


@dataclass(frozen=True)
class Peer:
    """A method and what it is made of."""

    name: str
    engine: str
    """ctxprune, transformers or kvpress."""
    make: Callable[[Tensor], Method]
    """From prompts (batch, n)."""
    weight_bytes: int = 0
    """Of the weights that a step reads."""
    dropped: float | None = None
    """Share of the prompt's keys that it is asked to drop; None where that is not asked."""
    pruned: bool = False
    facts: dict[str, object] = field(default_factory=dict)
    """What a record says of it besides."""
    absent: str | None = None
    """Why it cannot run here."""


def now(device: torch.device) -> float:
    """The time at which all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
