"""What is left to choose where nothing shows what will be needed? Recall whose context is facts and nothing else.

    START fact fact fact ... fact SEP | key value key value ...

A fact is one token, its key and value in one id: facts of several tokens would show which of these matter. All rows
hold equally many, and any of them may be asked for with the same probability. No way to choose among them beats
another: of a share of the facts, that share of the questions can be answered. The twin of recall, where facts differ
from filler and their number shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ctxprune.tasks.symbols import SEP, SPECIAL, START, Drawn, Symbols, distinct
from ctxprune.tasks.task import Split, TaskBatch, at_least, stream
from ctxprune.text.batches import IGNORED


@dataclass(frozen=True)
class RecallInvisibleConfig(Drawn):
    """Facts with different keys, some of which are asked for. Needed: those. Every row is as hard as the others."""

    name: ClassVar[str] = "recall_invisible"
    facts: int = 64
    """Facts of each row; its context has two tokens more."""
    questions: int = 8
    """Facts that are asked for; a row has twice as many tokens after its context."""
    keys: int = 64
    """Different keys."""
    values: int = 16
    """Different values; guessing is right once in so many times. There are `keys` * `values` different facts."""

    def __post_init__(self):
        at_least(self.name, 1, questions=self.questions, values=self.values)
        at_least(self.name, self.questions, facts=self.facts)
        at_least(self.name, self.facts, keys=self.keys)

    @property
    def length(self) -> int:
        """Tokens of the context, START and SEP included."""
        return self.facts + 2

    @property
    def symbols(self) -> Symbols:
        """Which ids are keys, values and, in the place of filler, facts: those of the first key first."""
        return Symbols(self.keys, self.values, self.keys * self.values)

    def batch(self, split: Split, seed: int, index: int, size: int) -> TaskBatch:
        """`size` rows of `length` + 2 * `questions` tokens; see ctxprune.tasks.task."""
        draw, symbols = stream(split, seed, index), self.symbols
        keys = distinct(draw, size, self.facts, self.keys)
        values = draw.integers(0, self.values, keys.shape)
        asked = distinct(draw, size, self.questions, self.facts)
        input_ids = np.full((size, self.length + 2 * self.questions), START)
        input_ids[:, 1 : self.length - 1] = symbols.first_filler + keys * self.values + values
        input_ids[:, self.length - 1] = SEP
        input_ids[:, self.length :: 2] = SPECIAL + np.take_along_axis(keys, asked, 1)
        input_ids[:, self.length + 1 :: 2] = symbols.first_value + np.take_along_axis(values, asked, 1)
        answers, questions = np.full_like(input_ids, IGNORED), np.full_like(input_ids, -1)
        answers[:, self.length :: 2] = input_ids[:, self.length + 1 :: 2]
        questions[:, self.length :: 2] = np.arange(self.questions)
        needed = np.zeros(input_ids.shape, dtype=bool)
        np.put_along_axis(needed, 1 + asked, True, 1)
        return TaskBatch(
            torch.from_numpy(input_ids),
            torch.from_numpy(answers),
            torch.from_numpy(questions),
            torch.full((size,), self.length),
            needed=torch.from_numpy(needed),
        )
