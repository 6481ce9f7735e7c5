"""Does one compression serve many questions? Recall in turns: each question stands in a later turn of its own.

A policy that reads the first question before it compresses keeps what that one needs; the later ones tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctxprune.tasks.facts import ask, draw_facts
from ctxprune.tasks.recall import RecallConfig
from ctxprune.tasks.symbols import evenly
from ctxprune.tasks.task import Split, TaskBatch, at_least, stream


@dataclass(frozen=True)
class QuestionsConfig(RecallConfig):
    """As recall, but a turn is TURN, chatter, key, value. Difficulty: number of facts, which is that of the turns."""

    name: ClassVar[str] = "questions"
    chatter: int = 4
    """Filler tokens of a turn before its question; a row has (`chatter` + 3) * `facts` tokens after its context."""

    def __post_init__(self):
        super().__post_init__()
        at_least(self.name, 0, chatter=self.chatter)

    def batch(self, split: Split, seed: int, index: int, size: int) -> TaskBatch:
        """`size` rows of `length` + (`chatter` + 3) * `facts` tokens; see ctxprune.tasks.task."""
        draw = stream(split, seed, index)
        count = evenly(draw, self.fewest, self.facts, size)
        facts = draw_facts(draw, self.symbols, size, self.length, count, self.facts, self.decoys)
        return ask(draw, self.symbols, facts, chatter=self.chatter)
