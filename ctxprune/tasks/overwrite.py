"""Can a policy drop what has become stale? x=3 ... x=7 ... x? is 7: of each key, only the latest value is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ctxprune.tasks.facts import Facts, ask
from ctxprune.tasks.symbols import FACT, SEP, SPECIAL, START, Drawn, distinct, evenly, fits, places, write
from ctxprune.tasks.task import Split, TaskBatch, at_least, stream


@dataclass(frozen=True)
class OverwriteConfig(Drawn):
    """Keys that are written several times in filler, then each asked once. Difficulty: number of different keys."""

    name: ClassVar[str] = "overwrite"
    length: int = 96
    """Tokens of the context, START and SEP included; a row has 2 * `variables` more."""
    fewest: int = 1
    """Smallest number of different keys in a row."""
    variables: int = 6
    """Largest number of different keys in a row; every number between is equally frequent in a batch."""
    writes: int = 12
    """Writes (FACT key value) in each row: of each key once, the others of random keys; a key's values all differ."""
    keys: int = 48
    """Different keys."""
    values: int = 32
    """Different values; guessing is right once in so many times."""
    fillers: int = 40
    """Different filler tokens, Zipf-distributed."""

    def __post_init__(self):
        at_least(self.name, 1, fewest=self.fewest, fillers=self.fillers)
        at_least(self.name, self.fewest, variables=self.variables)
        at_least(self.name, self.variables, writes=self.writes, keys=self.keys)
        at_least(self.name, self.writes, values=self.values)
        fits(self.name, self.length, self.writes, 3, 2)

    def batch(self, split: Split, seed: int, index: int, size: int) -> TaskBatch:
        """`size` rows of `length` + 2 * `variables` tokens; see ctxprune.tasks.task."""
        draw, symbols = stream(split, seed, index), self.symbols
        count = evenly(draw, self.fewest, self.variables, size)
        column = np.arange(self.writes)
        # The first `count` columns name each key once; columns lie anywhere in the context.
        variable = np.where(column < count[:, None], column, draw.integers(0, count[:, None], (size, self.writes)))
        names = SPECIAL + distinct(draw, size, self.variables, self.keys)
        keys = np.take_along_axis(names, variable, axis=1)
        # Values of one key differ, those of different keys are independent: no answer tells anything about a later one.
        shift = np.take_along_axis(draw.integers(0, self.values, (size, self.variables)), variable, axis=1)
        values = symbols.first_value + (distinct(draw, size, self.writes, self.values) + shift) % self.values
        at = 1 + places(draw, size, self.writes, 3, self.length - 2)
        context = symbols.filler(draw, size, self.length)
        context[:, 0], context[:, -1] = START, SEP
        write(context, at, at > 0, np.full_like(at, FACT), keys, values)
        mine = variable[:, None] == np.arange(self.variables)[:, None]
        latest = np.where(mine, at[:, None], -1).argmax(axis=2)
        at, values = (np.take_along_axis(array, latest, axis=1) for array in (at, values))
        return ask(draw, symbols, Facts(context, at, names, values, count, self.variables))
