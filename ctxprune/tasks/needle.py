"""Is one fact found wherever it lies in a long filler? Depths and lengths; train on short ones, test longer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ctxprune.errors import UserError
from ctxprune.tasks.facts import Facts, ask
from ctxprune.tasks.symbols import FACT, SEP, SPECIAL, START, Drawn, fits, write
from ctxprune.tasks.task import Split, TaskBatch, at_least, stream


@dataclass(frozen=True)
class NeedleConfig(Drawn):
    """One fact in filler, then its key. Difficulty: its depth, 0 (right after START) to 1 (right before SEP)."""

    name: ClassVar[str] = "needle"
    length: int = 512
    """Tokens of the context, START and SEP included; a row has 2 more."""
    depth: float | None = None
    """Where the fact lies, 0 to 1; None: anywhere, drawn for each row."""
    keys: int = 48
    """Different keys."""
    values: int = 32
    """Different values; guessing is right once in so many times."""
    fillers: int = 40
    """Different filler tokens, Zipf-distributed."""

    def __post_init__(self):
        at_least(self.name, 1, keys=self.keys, values=self.values, fillers=self.fillers)
        fits(self.name, self.length, 1, 3, 2)
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise UserError(f"needle: depth is {self.depth}: give 0 to 1, or none for anywhere")

    def batch(self, split: Split, seed: int, index: int, size: int) -> TaskBatch:
        """`size` rows of `length` + 2 tokens; see ctxprune.tasks.task."""
        draw, symbols = stream(split, seed, index), self.symbols
        context = symbols.filler(draw, size, self.length)
        context[:, 0], context[:, -1] = START, SEP
        last = self.length - 5  # tokens that can stand before the fact, START left out
        before = draw.integers(0, last + 1, (size, 1))
        if self.depth is not None:
            before[:] = round(self.depth * last)
        keys = SPECIAL + draw.integers(0, self.keys, (size, 1))
        values = symbols.first_value + draw.integers(0, self.values, (size, 1))
        one = np.ones((size, 1), dtype=np.int64)
        write(context, 1 + before, one > 0, FACT * one, keys, values)
        facts = Facts(context, 1 + before, keys, values, one[:, 0], 1)
        return ask(draw, symbols, facts, difficulty=before[:, 0] / max(last, 1))


def grid(lengths: Iterable[int], depths: Iterable[float], **fields: int) -> list[NeedleConfig]:
    """A config for each length and depth, lengths outermost; `fields` are those of NeedleConfig."""
    depths = list(depths)
    return [NeedleConfig(length=length, depth=depth, **fields) for length in lengths for depth in depths]
