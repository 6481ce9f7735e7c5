"""What is a peer? One way to do an operation: prepared on a problem off the clock, then timed pass by pass."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ctxprune import kernels
from ctxprune.kernels.decode import native_path
from pipelines.kernel_benchmark.problem import Problem

NO_GATES = "SDPA, no gates"
"""The dense model's cost, in every operation."""
REFERENCE = "reference formulation"
"""The published formulation, n x n tensors throughout."""


def _nothing() -> None:
    pass


def _no_more() -> list[Tensor]:
    return []


@dataclass
class Prepared:
    """A peer on one problem."""

    passes: dict[str, Callable[[], list[Tensor]]]
    """What is timed, by name. The operation's main pass returns all that has to be right."""
    before: Callable[[], None] = _nothing
    """Called before each pass, off the clock: brings back the state that a pass starts from."""
    left: Callable[[], list[Tensor]] = _no_more
    """Called after a pass, off the clock: results that it left behind rather than returned."""
    facts: dict[str, object] = field(default_factory=dict)
    """What a record says beside times."""


Prepare = Callable[[Problem], Prepared]


@dataclass(frozen=True)
class Peer:
    """A way to do one operation; gated: with the problem's gates, else the dense model's cost."""

    name: str
    prepare: Prepare
    gated: bool
    exact: Prepare | None = None
    """Ours only: the same in float64, held against it before anything is timed."""
    plain: Prepare | None = None
    """Ours only: the same with n x n tensors in the problem's precision; twice its error is allowed."""
    pair_bytes: int = 0
    """Bytes it keeps per row and pair of tokens, where it has n x n tensors."""
    compiles: bool = False
    """It is compiled anew for each length, which takes memory of its own."""
    absent: str | None = None
    """Why it cannot run here."""


def implementations(operation: str, device: torch.device, dtype: str = "float32") -> list[str]:
    """Our implementations that are meant for the device and can run there; the one that impl="auto" takes comes
    first."""
    triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    native = device.type == "cpu" and getattr(torch, dtype) in native_path.DTYPES and not native_path.available()
    wanted = ("triton",) if triton else ("native", "torch") if native else ("torch",)
    return [name for name in wanted if name in kernels.IMPLEMENTATIONS[operation]]


def results(prepared: Prepared, main: str) -> list[Tensor]:
    """Everything that one main pass gives, from the state it has to start from."""
    prepared.before()
    return [*prepared.passes[main](), *prepared.left()]
