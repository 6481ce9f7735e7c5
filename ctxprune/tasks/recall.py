"""Can a policy tell what will be asked from what only looks like it? Facts and decoys in filler, then every fact's key.

No decoy is ever asked for, so a policy that compresses at SEP can know what to keep: the facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctxprune.tasks.facts import ask, draw_facts
from ctxprune.tasks.symbols import Drawn, evenly, fits
from ctxprune.tasks.task import Split, TaskBatch, at_least, stream


@dataclass(frozen=True)
class RecallConfig(Drawn):
    """1 to 8 facts among decoys and filler; all keys of a row differ. Difficulty: its facts."""

    name: ClassVar[str] = "recall"
    length: int = 96
    """Tokens of the context, START and SEP included; a row has 2 * `facts` more."""
    fewest: int = 1
    """Smallest number of facts in a row."""
    facts: int = 8
    """Largest number of facts in a row; any number between is equally likely."""
    decoys: int = 6
    """Decoys in each row."""
    keys: int = 48
    """Different keys, of facts and decoys alike."""
    values: int = 32
    """Different values; guessing is right once in so many times."""
    fillers: int = 40
    """Different filler tokens, Zipf-distributed."""

    def __post_init__(self):
        at_least(self.name, 1, fewest=self.fewest, values=self.values, fillers=self.fillers)
        at_least(self.name, self.fewest, facts=self.facts)
        at_least(self.name, 0, decoys=self.decoys)
        triples = self.facts + self.decoys
        at_least(self.name, triples, keys=self.keys)
        fits(self.name, self.length, triples, 3, 2)

    def batch(self, split: Split, seed: int, index: int, size: int) -> TaskBatch:
        """`size` rows of `length` + 2 * `facts` tokens; see ctxprune.tasks.task."""
        draw = stream(split, seed, index)
        count = evenly(draw, self.fewest, self.facts, size)
        return ask(
            draw, self.symbols, draw_facts(draw, self.symbols, size, self.length, count, self.facts, self.decoys)
        )
