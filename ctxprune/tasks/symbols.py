"""What do the integers of a synthetic task stand for? Special ids first, then keys, values and filler; who places them?

Everything is drawn for a whole batch at once: a training step of a small model takes a tenth of a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctxprune.errors import UserError
from ctxprune.tasks.task import Split

START = 0
"""First token of every row."""
SEP = 1
"""Last token of the context: questions follow."""
FACT = 2
"""Opens a fact: FACT key value."""
DECOY = 3
"""Opens what looks like a fact (or a rule) and is never asked for."""
TURN = 4
"""Opens a turn of a conversation."""
RULE = 5
"""Opens an instruction."""
END = 6
"""Fills a row after its last answer."""
SPECIAL = 8
"""Ids below are special; the first key has this id."""


@dataclass(frozen=True)
class Symbols:
    """How many ids of each kind: keys, then values, then filler, from SPECIAL on."""

    keys: int
    values: int
    fillers: int

    @property
    def first_value(self) -> int:
        """Id of the first value."""
        return SPECIAL + self.keys

    @property
    def first_filler(self) -> int:
        """Id of the first filler, which is also the most frequent."""
        return self.first_value + self.values

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""
        return self.first_filler + self.fillers

    def filler(self, draw: np.random.Generator, rows: int, n: int) -> np.ndarray:
        """Ids int64 [rows, n], Zipf-distributed: filler number r (from 1) has a probability proportional to 1/r."""
        weight = np.cumsum(1.0 / np.arange(1, self.fillers + 1))
        rank = np.searchsorted(weight / weight[-1], draw.random((rows, n)), side="right")
        return self.first_filler + np.minimum(rank, self.fillers - 1)


class Drawn:
    """What synthetic tasks share: ids from their numbers of keys, values and fillers, and as many rows as one likes."""

    keys: int
    values: int
    fillers: int

    @property
    def symbols(self) -> Symbols:
        """Which ids are keys, values and filler."""
        return Symbols(self.keys, self.values, self.fillers)

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""
        return self.symbols.vocab_size

    def rows(self, split: Split) -> int | None:
        """As many as you ask for; see ctxprune.tasks.task."""
        return None


def evenly(draw: np.random.Generator, fewest: int, most: int, rows: int) -> np.ndarray:
    """int64 [rows] from `fewest` to `most`, in random order: each equally often in these rows, as far as that goes.

    Batches are then equally hard, and a policy that keeps more of hard rows keeps as much of one batch as of another.
    """
    span = most - fewest + 1
    return draw.permutation(fewest + (draw.integers(span) + np.arange(rows)) % span)


def distinct(draw: np.random.Generator, rows: int, count: int, pool: int) -> np.ndarray:
    """int64 [rows, count]: in each row `count` different numbers below `pool`, in random order."""
    return np.argsort(draw.random((rows, pool)), axis=1)[:, :count]


def places(draw: np.random.Generator, rows: int, chunks: int, width: int, room: int) -> np.ndarray:
    """First positions, int64 [rows, chunks], of chunks of `width` tokens that do not overlap in [0, room).

    Every arrangement is equally likely; column c is chunk c, wherever it lies. The caller has checked that they fit.
    """
    spots = np.sort(distinct(draw, rows, chunks, room - chunks * (width - 1)), axis=1)
    starts = spots + np.arange(chunks) * (width - 1)
    return np.take_along_axis(starts, distinct(draw, rows, chunks, chunks), axis=1)


def write(ids: np.ndarray, at: np.ndarray, where: np.ndarray, *tokens: np.ndarray) -> None:
    """Put tokens[0], tokens[1], ... (each [rows, chunks]) from position `at` on into `ids`, for the chunks `where`."""
    row, chunk = np.nonzero(where)
    for offset, token in enumerate(tokens):
        ids[row, at[row, chunk] + offset] = token[row, chunk]


def fits(task: str, length: int, chunks: int, width: int, extra: int) -> None:
    """UserError when `chunks` chunks of `width` tokens and `extra` others do not fit into a context of `length`."""
    if length < chunks * width + extra:
        raise UserError(f"{task}: length is {length}, too short for what stands in it: give {chunks * width + extra}")
