"""How do facts stand in a context, and how are they asked? As triples in filler; each key is asked once.

    START filler FACT key value filler DECOY key value ... SEP | key value key value ... END

Multi-query associative recall (arXiv 2312.04927) with decoys. Asking a key twice would give the answer away: the first
answer stands in the row by then.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ctxprune.tasks.symbols import DECOY, END, FACT, SEP, SPECIAL, START, TURN, Symbols, distinct, places, write
from ctxprune.tasks.task import TaskBatch
from ctxprune.text.batches import IGNORED


@dataclass(frozen=True)
class Facts:
    """Triples FACT key value (the first `count` of a row) and DECOY key value (from column `most` on) in a context."""

    context: np.ndarray
    """Ids, int64 [rows, length]."""
    at: np.ndarray
    """Position of each triple's marker, int64 [rows, triples]."""
    keys: np.ndarray
    """Their keys, int64 [rows, triples], different within a row."""
    values: np.ndarray
    """Their values, int64 [rows, triples], independent of each other: an answer tells nothing about a later one."""
    count: np.ndarray
    """Facts in each row, int64 [rows]."""
    most: int
    """Largest number of facts of any row."""


def draw_facts(
    draw: np.random.Generator, symbols: Symbols, rows: int, length: int, count: np.ndarray, most: int, decoys: int
) -> Facts:
    """`count` facts (int64 [rows], at most `most`) and `decoys` decoys in each row of filler, anywhere."""
    triples = most + decoys
    context = symbols.filler(draw, rows, length)
    at = 1 + places(draw, rows, triples, 3, length - 2)
    keys = SPECIAL + distinct(draw, rows, triples, symbols.keys)
    values = symbols.first_value + draw.integers(0, symbols.values, (rows, triples))
    column = np.arange(triples)
    marker = np.broadcast_to(np.where(column < most, FACT, DECOY), at.shape)
    write(context, at, (column < count[:, None]) | (column >= most), marker, keys, values)
    context[:, 0], context[:, -1] = START, SEP
    return Facts(context, at, keys, values, count, most)


def ask(
    draw: np.random.Generator,
    symbols: Symbols,
    facts: Facts,
    *,
    chatter: int | None = None,
    difficulty: np.ndarray | None = None,
) -> TaskBatch:
    """The contexts, each followed by its facts' keys and values in random order.

    chatter: how many filler tokens stand between TURN and a question; None: questions follow each other directly.
    difficulty: float [rows]; None: the number of facts.
    """
    rows, length = facts.context.shape
    most, column = facts.most, np.arange(facts.most)
    asked = column < facts.count[:, None]
    order = np.argsort(draw.random((rows, most)) + ~asked, axis=1)  # facts that a row lacks come last
    keys, values = (np.take_along_axis(tokens[:, :most], order, axis=1) for tokens in (facts.keys, facts.values))
    lead = 0 if chatter is None else 1 + chatter
    turns = np.full((rows, most, lead + 2), END)
    if chatter is not None:
        turns[:, :, 0] = TURN
        turns[:, :, 1:lead] = symbols.filler(draw, rows, most * chatter).reshape(rows, most, chatter)
    turns[:, :, lead], turns[:, :, lead + 1] = keys, values
    turns[~asked] = END
    answers = np.full_like(turns, IGNORED)
    answers[:, :, lead] = np.where(asked, values, IGNORED)
    questions = np.full_like(turns, -1)
    questions[:, :, lead] = np.where(asked, column, -1)
    needed = np.zeros((rows, length), dtype=np.int64)
    one = np.ones_like(facts.at[:, :most])
    write(needed, facts.at[:, :most], asked, one, one, one)
    return _whole(facts.context, turns, answers, questions, needed, facts.count if difficulty is None else difficulty)


def _whole(context, turns, answers, questions, needed, difficulty) -> TaskBatch:
    """Context and turns side by side, as tensors."""
    rows, length = context.shape

    def row(first: np.ndarray, rest: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([first, rest.reshape(rows, -1)], axis=1))

    return TaskBatch(
        input_ids=row(context, turns),
        answers=row(np.full_like(context, IGNORED), answers),
        questions=row(np.full_like(context, -1), questions),
        context_end=torch.full((rows,), length),
        needed=row(needed, np.zeros_like(turns)).bool(),
        difficulty=torch.from_numpy(difficulty).float(),
    )
