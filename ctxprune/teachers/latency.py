"""What does a kept key cost on this machine? Attention of one token, timed layer by layer over several numbers of keys.

With its `cost` an agent's reward is right answers less measured time, the price of time in shares of right answers.
What it has learned to keep is timed again by `attention_ms`, and held against what the table says of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune import kernels
from ctxprune.cache.layer_cache import LayerCache
from ctxprune.errors import UserError
from ctxprune.kernels.decode.pages import NEVER
from ctxprune.replay import Context, read

SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Of the context's keys, at which the table is measured."""
TOKENS = 8
"""Tokens that are timed together."""


@dataclass(frozen=True)
class LatencyTable:
    """keys: rising numbers of keys per sequence. ms: of each layer's attention of one token, all sequences of a batch
    together, at these; must not fall. length: keys of the whole context."""

    keys: Float[Tensor, " points"]
    ms: Float[Tensor, "layers points"]
    length: int

    def __post_init__(self):
        if len(self.keys) < 2 or bool((self.keys.diff() <= 0).any()):
            raise UserError(f"a table over {self.keys.tolist()} keys: give at least 2, rising")
        if bool((self.ms.diff() < 0).any()) or bool((self.ms[:, -1] <= 0).any()):
            raise UserError("a table's times fall, or are none: pass them through ctxprune.teachers.latency.isotonic")

    def predict(self, kept: Float[Tensor, "layers rows"]) -> Float[Tensor, "layers rows"]:
        """ms of each layer where every sequence of the batch keeps this many keys: linear between the points, and
        beyond the last one as it rose before it. Of sequences that differ, the batch's is the mean."""
        kept = kept.to(self.keys)
        place = torch.searchsorted(self.keys, kept.contiguous()).clamp(1, len(self.keys) - 1)
        low, high = self.keys[place - 1], self.keys[place]
        before, after = self.ms.gather(1, place - 1), self.ms.gather(1, place)
        return before + (after - before) * (kept - low) / (high - low)

    def cost(self, shares: Float[Tensor, "layers rows"]) -> Float[Tensor, " rows"]:
        """Time of a token over these shares of the context, all layers together, as a share of that over all of it: the
        `cost` of ctxprune.teachers.reward."""
        whole = self.predict(torch.full((len(shares), 1), float(self.length)))
        return (self.predict(shares * self.length).sum(0) / whole.sum()).to(shares)


def measure(model, length: int, *, rows: int = 16, repeats: int = 15) -> LatencyTable:
    """The table of a retrofitted model on this machine, for `rows` contexts of `length` tokens."""
    if length < 8:
        raise UserError(f"length is {length}: give at least 8 tokens, below that no difference can be timed")
    keys = torch.tensor(sorted({max(1, round(share * length)) for share in SHARES}))
    layers = _two_tokens(model).layers
    found = attention_ms(model, keys[:, None, None].expand(-1, layers, rows), repeats=repeats)
    return LatencyTable(keys.double(), torch.stack([isotonic(times) for times in found.T]), length)


@torch.no_grad()
def attention_ms(model, kept: Int[Tensor, "cases layers rows"], *, repeats: int = 15) -> Float[Tensor, "cases layers"]:
    """Measured: ms of each layer's attention of one token for a batch whose sequences hold these many keys. The median
    of `repeats`, cases and layers in turn, so that a machine that slows down does so for all of them."""
    shapes = _two_tokens(model)
    steps = [
        [_Step.of(shapes.queries[layer], shapes.keys[layer], held) for layer, held in enumerate(case)] for case in kept
    ]
    times: list[list[list[float]]] = [[[] for _ in case] for case in steps]
    for turn in range(repeats + 1):  # the first is a warm-up
        for case, layers in enumerate(steps):
            for layer, step in enumerate(layers):
                taken = step.ms()
                if turn:
                    times[case][layer].append(taken)
    return torch.tensor([[statistics.median(one) for one in case] for case in times], dtype=torch.float64)


def isotonic(times: Float[Tensor, " points"] | Sequence[float]) -> Float[Tensor, " points"]:
    """The nearest times that do not fall, by least squares (pool adjacent violators): more keys are not faster."""
    blocks: list[tuple[float, int]] = []
    for value in torch.as_tensor(times).tolist():
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (first, many), (second, more) = blocks[-2:]
            blocks[-2:] = [((first * many + second * more) / (many + more), many + more)]
    return torch.tensor([value for value, many in blocks for _ in range(many)], dtype=torch.float64)


def _two_tokens(model) -> Context:
    return read(model, torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device))


@dataclass
class _Step:
    """One layer's pages, and a token that comes again and again: it is gone with the next one."""

    layer: LayerCache
    token: tuple[Tensor, Tensor, Tensor]
    next: int

    @staticmethod
    def of(query: Tensor, key: Tensor, held: Int[Tensor, " rows"]) -> _Step:
        """Pages that hold so many keys per row, of the shapes of query and key (1, heads, n, width)."""
        held = held.to(key.device)
        rows, most, draw = len(held), int(held.max()), torch.Generator().manual_seed(0)

        def numbers(like: Tensor, *n: int) -> Tensor:
            shape = (rows, like.shape[1], *n, like.shape[3])
            return torch.randn(shape, generator=draw).to(like)

        layer = LayerCache(
            rows, kv_heads=key.shape[1], width=key.shape[3], rank=None, page=16, dtype=key.dtype, device=key.device
        )
        layer.make_room_for(held)
        step = torch.arange(most, device=key.device).expand(rows, -1)
        step = step.masked_fill(step >= held[:, None], -1).to(torch.int32)
        forever = torch.full_like(step, NEVER)
        layer.pages.store(numbers(key, most), numbers(key, most), None, step, forever, forever)
        return _Step(layer, (numbers(query), numbers(key), numbers(key)), most)

    def ms(self) -> float:
        """Of one token: TOKENS of them, on the wall clock, as generation calls its kernel."""
        rows = self.layer.rows
        start = time.perf_counter()
        for _ in range(TOKENS):
            step = torch.full((rows,), self.next, dtype=torch.int32, device=self.token[0].device)
            self.layer.make_room(step)
            kernels.decode_attention(
                *self.token, None, None, None, step, self.layer.pages, guard=step + 1, drop_time=step + 1, check=False
            )
            self.next += 1
        if self.token[0].is_cuda:
            torch.cuda.synchronize(self.token[0].device)
        return 1e3 * (time.perf_counter() - start) / TOKENS
