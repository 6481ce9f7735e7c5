"""Are our own results right? Held against the float64 reference, operation by operation, before anything is timed."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from pipelines.config import KernelsConfig
from pipelines.kernel_benchmark.peer import results
from pipelines.kernel_benchmark.problem import Case

TOKENS = 96
"""Tokens of the problems on which results are compared."""
ROWS = 2
"""Their rows."""
ALLOWED = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 6e-3}
"""Largest error over the largest entry of an output, gradient or count; twice that of the n x n form in the same
precision where that is more. Where a sharp gate is about to close, the rounding of its logit decides: the order of a
sum alone moved a float32 gradient's error between 3e-6 and 6e-5 (measured, alpha 8)."""


def disagreement(
    name: str, operation: ModuleType, settings: KernelsConfig, cases: Iterable[Case], device: torch.device
) -> tuple[float, float]:
    """Largest error of what we compute in an operation over the largest entry, and the error allowed."""
    wrong, allowed = 0.0, ALLOWED[settings.dtype]
    for case in cases:
        given = case.problem(name)
        for peer in operation.peers(settings, device, given.query.shape[1]):
            if peer.exact is None or peer.plain is None:
                continue
            exact, plain, found = (results(f(given), operation.MAIN) for f in (peer.exact, peer.plain, peer.prepare))
            allowed = max(allowed, 2 * largest_error(plain, exact))
            wrong = max(wrong, largest_error(found, exact))
    return wrong, allowed


def largest_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Over all tensors, each by its largest entry; one that holds a NaN is infinitely wrong."""
    worst, scale = 0.0, 1.0
    for one, other in zip(found, exact, strict=True):
        largest = max(1.0, other.double().abs().max().item())
        # A single number is beta's gradient: it adds up, and cancels, what the tensor before it shows key by key.
        scale = max(scale, largest) if other.ndim == 0 else largest
        worst = max(worst, ((one.double() - other.double()).abs().max() / scale).nan_to_num(torch.inf).item())
    return worst
