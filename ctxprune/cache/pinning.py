"""Which positions does nothing ever drop? Spans that a person pinned, row by row of a batch that changes."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def pinned_at(pinned: Tensor | None, position: Int[Tensor, ...], row: Tensor) -> Bool[Tensor, ...] | None:
    """Which of these positions of these rows are pinned."""
    if pinned is None:
        return None
    pinned = pinned.to(position.device)
    known = position < pinned.shape[1]
    return pinned[row, position.clamp(max=pinned.shape[1] - 1).long()] & known


def stacked(pinned: list[Tensor | None]) -> Bool[Tensor, "rows positions"] | None:
    """Pinned positions of each row, (positions,) or None, together: False behind the shorter ones."""
    if all(one is None for one in pinned):
        return None
    nothing = torch.zeros(1, dtype=torch.bool)
    rows = [nothing if one is None else one.cpu() for one in pinned]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=False)


def each_row(pinned: Bool[Tensor, "rows positions"] | None, rows: int) -> list[Tensor | None]:
    """The inverse, for that many rows."""
    return [None] * rows if pinned is None else list(pinned)
