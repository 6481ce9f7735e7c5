"""What does a block of queries see? The keys that still live, copied side by side once per segment, and their log I."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ctxprune.kernels.soft_attention.torch_gates import DEAD, block_gates

BLOCK = 64
"""Queries per block. Measured on 2 cores at n = 256: 64 is fastest; kept memory is n^2/BLOCK per row of the batch."""

SEGMENT = 256
"""Queries per segment, a multiple of BLOCK: of its own keys a segment skips none."""

SEGMENTS_FROM = 1024
"""Tokens above which rows are cut into segments, and computed one by one, since each has its own living keys. Shorter
rows have little to leave out and are computed together."""

WORTH_GATHERING = 0.7
"""Living keys are copied when they are at most this share of those before the segment."""


class Keys(NamedTuple):
    """What a segment needs of each key it may see: of those living before it, then of its own."""

    key: Tensor
    value: Tensor
    interaction: Tensor
    guard: Tensor
    end: Tensor


class Layer(NamedTuple):
    """The arguments of pruned_attention, floats in the precision in which all is computed."""

    query: Tensor
    key: Tensor
    value: Tensor
    interaction_query: Tensor
    interaction_key: Tensor
    beta: Tensor
    guard: Tensor
    end: Tensor
    alpha: float
    scale: float

    @staticmethod
    def of(tensors: list[Tensor], alpha: float, scale: float) -> Layer:
        work = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        query, key, value, interaction_query, interaction_key, beta = (tensor.to(work) for tensor in tensors[:6])
        guard, end = tensors[6:]
        return Layer(query, key, value, interaction_query, interaction_key, beta, guard, end, alpha, scale)

    def segments(self) -> list[tuple[int, int]]:
        """(first query, end) of each segment."""
        n, size = self.query.shape[2], segment_size(self.query)
        return [(begin, min(n, begin + size)) for begin in range(0, n, size)]

    def keys(self, living: Tensor | None, finish: int) -> Keys:
        """Those of the segment that ends before query `finish`."""
        tensors = (self.key, self.value, self.interaction_key, self.guard, self.end)
        return Keys(*(taken(tensor, living, finish) for tensor in tensors))

    def survival(self, seen: Keys, carry: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """log I of a block's queries, -inf for keys after them, and d ln g/dx; each (batch, rows, keys seen).

        carry: log I of the keys seen (batch, keys seen) before the block.
        """
        log_gate, slope = block_gates(
            self.interaction_query[:, start:stop], seen.interaction, self.beta, self.alpha, seen.guard, seen.end,
            carry, start,
        )  # fmt: skip
        log_alive = log_gate.cumsum(1).add_(carry[:, None])
        later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=carry.device).triu_(1)
        log_alive[:, :, start - stop :].masked_fill_(later, -torch.inf)
        return log_alive, slope

    def weights(self, seen: Keys, log_alive: Tensor, start: int, stop: int) -> Tensor:
        """softmax(q k^T scale + log I): (batch, kv_heads, groups * rows, keys seen). The diagonal is always finite."""
        batch, kv_heads, count, width = seen.key.shape
        queries = self.query[:, :, start:stop].reshape(batch, kv_heads, -1, width)
        logits = (queries * self.scale) @ seen.key.transpose(2, 3)
        logits.view(batch, kv_heads, -1, stop - start, count).add_(log_alive[:, None, None])
        return torch.softmax(logits, -1)


def segment_size(query: Tensor) -> int:
    """Queries per segment. On a GPU all: a look at who lives would wait for the host."""
    n = query.shape[2]
    return SEGMENT if query.device.type == "cpu" and n > SEGMENTS_FROM else n


def living_keys(carry: Tensor, end: Tensor, begin: int, finish: int) -> Tensor | None:
    """Positions of the keys that query `begin` may see, and of the segment's own; None: all up to `finish`.

    carry: log I before the segment, (1, n); end: (1, n).
    """
    if begin == 0:
        return None
    living = ((carry[0, :begin] > DEAD) & (end[0, :begin] > begin)).nonzero().view(-1)
    if len(living) > WORTH_GATHERING * begin:
        return None
    return torch.cat([living, torch.arange(begin, finish)])


def blocks(begin: int, finish: int) -> Iterator[tuple[int, int]]:
    """(first query, end) of each block of a segment."""
    return ((start, min(finish, start + BLOCK)) for start in range(begin, finish, BLOCK))


def taken(tensor: Tensor, living: Tensor | None, finish: int) -> Tensor:
    """What a tensor says of the living keys: a copy, or where all live a view."""
    axis = _keys_axis(tensor)
    return tensor.narrow(axis, 0, finish) if living is None else tensor.index_select(axis, living)


def without_last(tensor: Tensor, count: int) -> Tensor:
    """A view of all but the last `count` keys."""
    axis = _keys_axis(tensor)
    return tensor.narrow(axis, 0, tensor.shape[axis] - count)


def _keys_axis(tensor: Tensor) -> int:
    return 2 if tensor.ndim == 4 else 1
