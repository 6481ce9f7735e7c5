"""Does an instruction of the first turn still hold many turns later? A rule says in which form every answer is given.

    START RULE rule chatter DECOY other-rule chatter ... SEP | TURN chatter key  TURN chatter key ...

The answer to a key is that key in the rule's form, as a word may be given in capitals. Answers do not stand in the row
(the next turn follows at once): the first one would tell the rule to all later ones. Rules after DECOY are quoted, not
given. The pitfall this looks for, instructions lost by compression: arXiv 2510.00231.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ctxprune.tasks.symbols import DECOY, RULE, SEP, SPECIAL, START, TURN, Drawn, Symbols, distinct, fits, places, write
from ctxprune.tasks.task import Split, TaskBatch, at_least, stream
from ctxprune.text.batches import IGNORED


@dataclass(frozen=True)
class DialogueConfig(Drawn):
    """One rule, quoted other rules, then turns with one key each, all different. Needed: RULE and the rule."""

    name: ClassVar[str] = "dialogue"
    length: int = 64
    """Tokens of the context, START and SEP included."""
    turns: int = 8
    """Turns after the context, each with one question."""
    chatter: int = 4
    """Filler tokens of a turn before its key; a row has (`chatter` + 2) * `turns` tokens after its context."""
    rules: int = 4
    """Different rules, that is forms of an answer; without the rule a guess is right once in so many times."""
    quotes: int = 2
    """Rules that are only quoted, in each context."""
    keys: int = 12
    """Different keys."""
    fillers: int = 40
    """Different filler tokens, Zipf-distributed."""

    def __post_init__(self):
        at_least(self.name, 1, turns=self.turns, fillers=self.fillers)
        at_least(self.name, 0, chatter=self.chatter, quotes=self.quotes)
        at_least(self.name, 2, rules=self.rules)
        at_least(self.name, self.turns, keys=self.keys)
        fits(self.name, self.length, self.quotes, 2, 4)

    @property
    def symbols(self) -> Symbols:
        """Which ids are keys, values (the keys in form 0, then in form 1, ...) and filler; the rules' names follow."""
        return Symbols(self.keys, self.rules * self.keys, self.fillers)

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""
        return self.symbols.vocab_size + self.rules

    def batch(self, split: Split, seed: int, index: int, size: int) -> TaskBatch:
        """`size` rows of `length` + (`chatter` + 2) * `turns` tokens; see ctxprune.tasks.task."""
        draw, symbols = stream(split, seed, index), self.symbols
        rule = draw.integers(0, self.rules, (size, 1))
        context = symbols.filler(draw, size, self.length)
        context[:, 0], context[:, 1], context[:, -1] = START, RULE, SEP
        context[:, 2:3] = symbols.vocab_size + rule
        at = 3 + places(draw, size, self.quotes, 2, self.length - 4)
        quoted = symbols.vocab_size + draw.integers(0, self.rules, at.shape)
        write(context, at, at > 0, np.full_like(at, DECOY), quoted)
        keys = distinct(draw, size, self.turns, self.keys)
        turns = np.full((size, self.turns, self.chatter + 2), TURN)
        turns[:, :, 1:-1] = symbols.filler(draw, size, self.turns * self.chatter).reshape(size, self.turns, -1)
        turns[:, :, -1] = SPECIAL + keys
        input_ids = np.concatenate([context, turns.reshape(size, -1)], axis=1)
        answers, questions = np.full_like(input_ids, IGNORED), np.full_like(input_ids, -1)
        asked = slice(self.length + self.chatter + 1, None, self.chatter + 2)
        answers[:, asked] = symbols.first_value + rule * self.keys + keys
        questions[:, asked] = np.arange(self.turns)
        needed = np.zeros(input_ids.shape, dtype=bool)
        needed[:, 1:3] = True
        return TaskBatch(
            torch.from_numpy(input_ids),
            torch.from_numpy(answers),
            torch.from_numpy(questions),
            torch.full((size,), self.length),
            needed=torch.from_numpy(needed),
        )
