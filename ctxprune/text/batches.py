"""Which tokens does a step train on? A pure function of (seed, step, rank): to resume needs one integer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.text.token_store import TokenSplit

IGNORED = -100
"""Label of a position that predicts nothing (torch.nn.functional.cross_entropy's ignore_index)."""


@dataclass(frozen=True)
class Batch:
    """Rows of consecutive tokens; several documents may share a row, but never see each other."""

    input_ids: Int64[Tensor, "batch n"]
    position_ids: Int64[Tensor, "batch n"]
    """Tokens since the document's first one in this row: 0 wherever a document starts and at the first token."""


def train_batch(split: TokenSplit, seed: int, step: int, rank: int, world: int, batch: int, context: int) -> Batch:
    """Rows of rank `rank` (of `world`) at step `step`: int64 [batch // world, context].

    The tokens form a ring, cut at an offset drawn per epoch into windows of `context` tokens; an epoch visits each
    window once, in an order drawn from (seed, epoch). Fewer than `context` tokens, others in each epoch, are left out.
    `batch` counts the rows of all ranks: rank r has the r-th part of them, so that a step sees the same rows whatever
    the number of workers. Raises UserError when `batch` does not divide over `world`, or for too little text.
    """
    windows = _window_count(split, context, "train")
    if batch % world or batch < world:
        lower = batch // world * world
        choices = f"{lower} or {lower + world}" if lower else f"{world}"
        raise UserError(f"train.batch={batch} does not divide over {world} workers: set it to {choices}")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world} workers")
    share = batch // world
    begins = np.empty(share, dtype=np.int64)
    visits = step * batch + rank * share + np.arange(share)
    for epoch in np.unique(visits // windows):
        in_epoch = visits // windows == epoch
        offset, order = _epoch(seed, int(epoch), windows, len(split.tokens))
        begins[in_epoch] = offset + order[visits[in_epoch] % windows] * context
    return _rows(split, begins, context)


def _epoch(seed: int, epoch: int, windows: int, tokens: int) -> tuple[int, np.ndarray]:
    draw = np.random.default_rng([seed, epoch])
    return int(draw.integers(tokens)), draw.permutation(windows)


def held_out_batches(split: TokenSplit, batch: int, context: int, max_tokens: int) -> Iterator[Batch]:
    """Held-out text in windows of `context` tokens, in order: int64 [batch, context], the last batch may be smaller.

    Tokens at the end that are short of a window are left out. At most `max_tokens` are returned, in windows spread
    evenly over the text. Raises UserError, at once, for too little text or a `max_tokens` below one window.
    """
    windows = _window_count(split, context, "held-out")
    if max_tokens < context:
        raise UserError(f"evaluate.tokens={max_tokens} is fewer than one context of {context} tokens: raise it")
    chosen = min(windows, max_tokens // context)
    begins = np.arange(chosen, dtype=np.int64) * windows // chosen * context
    return (_rows(split, begins[first : first + batch], context) for first in range(0, chosen, batch))


def _window_count(split: TokenSplit, context: int, name: str) -> int:
    tokens = len(split.tokens)
    if tokens < context:
        few = f"{name} text has {tokens} tokens, fewer than train.context={context}"
        raise UserError(f"{few}: give more text or lower train.context")
    return tokens // context


def _rows(split: TokenSplit, begins: np.ndarray, context: int) -> Batch:
    """The windows of `context` tokens that begin at `begins` (int64 [batch]), read around the ring."""
    column = np.arange(context, dtype=np.int64)
    index = (begins[:, None] + column) % len(split.tokens)
    since_start = index - split.starts[np.searchsorted(split.starts, index, side="right") - 1]
    # A document that began before the window counts from the window's first token.
    positions = np.minimum(since_start, column)
    return Batch(torch.from_numpy(split.tokens[index].astype(np.int64)), torch.from_numpy(positions))


def targets(batch: Batch) -> Int64[Tensor, "batch n"]:
    """Next-token labels: the id one to the right; -100 at the row's end and where another document starts there."""
    labels = torch.full_like(batch.input_ids, IGNORED)
    starts = batch.position_ids[:, 1:] == 0
    labels[:, :-1] = batch.input_ids[:, 1:].masked_fill(starts, IGNORED)
    return labels
