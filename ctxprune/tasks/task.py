"""What is a task to a policy? Rows of tokens whose answers are known, and the place where the context ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ctxprune.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class TaskBatch:
    """Rows of one task. Nothing is shifted: what stands at a position is about the logits AT that position.

    Rows of synthetic tasks are equally long and end their context together; those of files are padded.
    """

    input_ids: Int64[Tensor, "batch n"]
    """Token ids; earlier answers stand in the row (teacher forcing) unless the task says otherwise."""
    answers: Int64[Tensor, "batch n"]
    """What the logits at a position must predict, IGNORED elsewhere: a token id, or for an encoder a label's index."""
    questions: Int64[Tensor, "batch n"]
    """Which question of its row (0, 1, ... in order of asking) an answer belongs to: a question is answered when all of
    its tokens are. -1 where there is no answer, or one that is trained on but not counted."""
    context_end: Int64[Tensor, " batch"]
    """First position after the context: a policy that must not know the question decides on what stands before."""
    attention_mask: Int64[Tensor, "batch n"] | None = None
    """0 at padding, else 1: on the left for decoders, so that rows end together, on the right for encoders. None: no
    padding."""
    needed: Bool[Tensor, "batch n"] | None = None
    """The tokens of the context that the counted questions ask for; None where nobody knows (real text)."""
    difficulty: Float[Tensor, " batch"] | None = None
    """How hard a row is, in the task's own unit (e.g. number of facts); None where it has none."""

    @property
    def position_ids(self) -> Int64[Tensor, "batch n"]:
        """Tokens of the row before each one, padding left out: what a model with learned positions wants to be told."""
        there = torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask
        return (there.cumsum(1) - 1).clamp(min=0)

    @property
    def end(self) -> int:
        """Where the contexts of all rows end, for what reads them side by side. UserError where they are padded or do
        not end together (rows of files)."""
        first = int(self.context_end[0])
        if self.attention_mask is not None and not bool(self.attention_mask.all()):
            raise UserError("rows of this batch are padded, which would be read as text: take rows of one length")
        if bool((self.context_end != first).any()):
            raise UserError("contexts of this batch end at different places: take a synthetic task, or rows one by one")
        return first

    def to(self, device: torch.device | str) -> TaskBatch:
        """The same batch on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if value is not None})


@runtime_checkable
class Task(Protocol):
    """A frozen config dataclass of plain values; batches are a pure function of it and three integers."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vocab_size(self) -> int:
        """Every token id is below it."""
        ...

    def rows(self, split: Split) -> int | None:
        """How many different rows the split has; None: as many as you ask for."""
        ...

    def batch(self, split: Split, seed: int, index: int, size: int) -> TaskBatch:
        """Batch `index` (0, 1, ...) of `size` rows. The same arguments give the same batch; splits share no row."""
        ...


def stream(split: str, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one batch. No two of (split, seed, index) share a stream.

    Raises UserError for an unknown split or a negative number.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}: give one of {', '.join(SPLITS)}")
    for name, value in (("seed", seed), ("index", index)):
        if value < 0:
            raise UserError(f"{name} is {value}: give 0 or more")
    return np.random.default_rng([SPLITS.index(split), seed, index])


def at_least(task: str, smallest: int, **fields: int) -> None:
    """UserError, naming the task and the field, for the first of `fields` that is below `smallest`."""
    for name, value in fields.items():
        if value < smallest:
            raise UserError(f"{task}: {name} is {value}: give at least {smallest}")
