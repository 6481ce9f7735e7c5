"""How long does a pass take? Every method in turn within a round, on the same rows, deciding included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int64
from torch import Tensor

from ctxprune.hidden_pruning import pruning_of
from pipelines.hidden_benchmark.method import DENSE, Method
from pipelines.hidden_benchmark.training import said
from pipelines.kernel_benchmark.clock import summary


@dataclass
class Passes:
    """Of one method, by round."""

    seconds: list[float] = field(default_factory=list)
    """Of whole passes."""
    deciding: list[float] = field(default_factory=list)
    """Of them spent on scoring and choosing tokens; 0 where nothing is dropped."""
    kept: list[tuple[int, ...]] = field(default_factory=list)
    """Tokens per row that entered each layer, mean over the rows, rounded."""


@torch.inference_mode()
def timed(
    subjects: Sequence[tuple[Method, torch.nn.Module]], ids: Int64[Tensor, "rows tokens"], batch: int, rounds: int
) -> dict[str, Passes]:
    """By method. Each round takes the next rows; the one before the first is a warm-up and not counted."""
    found = {method.name: Passes() for method, _ in subjects}
    for turn in range(rounds + 1):
        rows = ids[(turn * batch + torch.arange(batch)) % len(ids)]
        for method, model in subjects:
            read = rows[:, : method.tokens]
            start = time.perf_counter()
            said(model, read)
            seconds = time.perf_counter() - start
            if turn:
                _noted(found[method.name], method, model, seconds, batch)
    return found


def told(passes: dict[str, Passes], name: str) -> dict[str, object]:
    """What a record says of a method's times. The ratio is that of dense in the same round: a slow minute of the
    machine hits both."""
    mine, dense = passes[name], passes[DENSE]
    ratios = [whole / own for whole, own in zip(dense.seconds, mine.seconds, strict=True)]
    deciding, middle = statistics.median(mine.deciding), statistics.median(mine.seconds)
    return {
        **summary("prefill", mine.seconds),
        "deciding_ms": 1e3 * deciding,
        "deciding_share": deciding / middle,
        "speedup": statistics.median(ratios),
        "speedup_spread": [min(ratios), max(ratios)],
        "rounds": len(ratios),
        "kept": list(mine.kept[0]),
    }


def _noted(passes: Passes, method: Method, model: torch.nn.Module, seconds: float, batch: int) -> None:
    stats = pruning_of(model).stats if method.pruning else None
    passes.seconds.append(seconds)
    passes.deciding.append(stats.seconds if stats else 0.0)
    passes.kept.append(tuple(round(count / batch) for count in stats.tokens) if stats else method.kept)
