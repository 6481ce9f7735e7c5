"""How does FlexAttention run under drop times? As a mask on keys in place, and on keys sorted so that it can skip.

In place, hardly a tile of 128 x 128 is dead as a whole, and only whole tiles are skipped. So the strong form sorts the
keys inside chunks by their drop time, the longest-lived first: for later queries the living keys are then the first of
each chunk. Attention is a sum over keys, so their order means nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from pipelines.kernel_benchmark.peer import Prepared
from pipelines.kernel_benchmark.problem import Problem, drop_times

CHUNK = 1024
"""Keys sorted among themselves: the longer, the fewer tiles are part alive, but the later all its keys are born."""
COMPILES = 256
"""Shapes and masks compiled in one process; beyond torch's own 8 it would quietly run the slow form."""


def in_place(given: Problem) -> Prepared:
    """Drop times as a mask on the keys where they lie."""
    given = given.inference()
    times = drop_times(given)

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [attend(given, given.key, given.value, visible_in_place(times))]

    return Prepared({"forward": run})


def keys_sorted(given: Problem) -> Prepared:
    """Keys, values, positions and drop times in the order of sorted_order, sorted inside the clock."""
    given = given.inference()
    times = drop_times(given)

    @torch.no_grad()
    def run() -> list[Tensor]:
        position = sorted_order(times)
        place = position[:, None, :, None]
        key, value = (t.gather(2, place.expand(-1, t.shape[1], -1, t.shape[3])) for t in (given.key, given.value))
        return [attend(given, key, value, visible_sorted(position, times.gather(1, position)))]

    return Prepared({"forward": run})


def sorted_order(times: Tensor) -> Tensor:
    """Keys in chunks, each chunk's longest-lived first: (batch, n) positions."""
    n = times.shape[-1]
    chunk = torch.arange(n, device=times.device) // CHUNK
    return torch.argsort(chunk * (n + 1) + (n - times.clamp(max=n)), dim=-1, stable=True)


def visible_in_place(times: Tensor) -> Callable[..., Tensor]:
    """FlexAttention's question: does this query see the key in this place?"""

    def visible(row, head, query, key):
        return (key <= query) & (query < times[row, key])

    return visible


def visible_sorted(position: Tensor, times: Tensor) -> Callable[..., Tensor]:
    """The same where place `key` holds the key of `position`, with its drop time."""

    def visible(row, head, query, key):
        return (position[row, key] <= query) & (query < times[row, key])

    return visible


def attend(given: Problem, key: Tensor, value: Tensor, visible: Callable[..., Tensor]) -> Tensor:
    """FlexAttention under a mask; its list of tiles is made here."""
    make_mask, attention = compiled(given.query.device.type)
    batch, _, n, _ = given.query.shape
    mask = make_mask(visible, batch, None, n, n, device=given.query.device)
    return attention(given.query, key, value, block_mask=mask, enable_gqa=given.grouped)


@cache
def compiled(device_type: str) -> tuple[Callable, Callable]:
    """create_block_mask and flex_attention. On a CPU the former stays as it is: compiling it too takes another
    minute."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.config.recompile_limit = COMPILES
    # fullgraph: running over the limit is then an error, which the record tells, and not a slow number.
    attention = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    if device_type != "cuda":
        return create_block_mask, attention
    return torch.compile(create_block_mask, dynamic=False, fullgraph=True), attention
