"""How is the next token picked?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.precision import exact, exactly


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked: temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}: give 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: give a number in (0, 1]")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: give 0 (off) or a positive number")


def probabilities(logits: Float[Tensor, "... vocab"], how: Sampling) -> Float[Tensor, "... vocab"]:
    """What the next token is drawn from, in float32 or better; greedy: 1 at the largest logit."""
    if how.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(exact(logits.dtype))
    scores = exactly(logits) / how.temperature
    if 0 < how.top_k < scores.shape[-1]:
        smallest = scores.topk(how.top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if how.top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True)
        before = torch.softmax(ordered, -1).cumsum(-1) - torch.softmax(ordered, -1)
        # The likeliest token always stays; the one that crosses top_p stays as well.
        scores = scores.scatter(-1, order, ordered.masked_fill(before >= how.top_p, -torch.inf))
    return torch.softmax(scores, -1)


def pick(
    logits: Float[Tensor, "batch vocab"], how: list[Sampling], generators: list[torch.Generator]
) -> Int[Tensor, " batch"]:
    """The next token of each row, by its own settings and its own generator."""
    chosen, alike = logits.argmax(-1), defaultdict(list)
    for row, own in enumerate(how):
        if own.temperature > 0:
            alike[replace(own, seed=0)].append(row)
    for own, rows in alike.items():
        uniform = torch.cat([_uniform(generators[row], 1) for row in rows])
        if len(rows) == len(how):  # no index to hand over to a GPU
            return drawn(probabilities(logits, own), uniform)
        chosen[rows] = drawn(probabilities(logits[rows], own), uniform)
    return chosen


def drawn(probability: Float[Tensor, "rows vocab"], uniform: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """A token per row for a number in [0, 1), by the inverse of the distribution function; never one of probability 0.

    probability: need not sum to 1, but to more than 0. A row of numbers that are none gets the last token: what it
    says means nothing, but its neighbours go on.
    """
    summed = probability.double().cumsum(-1)
    # No product of a number below 1 rounds up to the sum in float64, so there is a first token beyond it.
    found = torch.searchsorted(summed, uniform.double()[:, None] * summed[:, -1:], right=True)[:, 0]
    return found.clamp(max=probability.shape[-1] - 1)


class RowDraws:
    """A stream of random numbers for each row, from a seed of its own, taken together."""

    BLOCK = 256
    """Numbers that a row's generator is asked for at once."""

    def __init__(self, seeds: Iterable[int], device: torch.device):
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        self.held = torch.zeros(len(self.generators), 0, dtype=torch.float64, device=device)

    def uniform(self, count: int) -> Float[Tensor, "rows count"]:
        """So many numbers in [0, 1) for each row."""
        while self.held.shape[1] < count:
            more = torch.stack([_uniform(one, self.BLOCK) for one in self.generators])
            self.held = torch.cat([self.held, more], 1)
        taken, self.held = self.held[:, :count], self.held[:, count:]
        return taken

    def pick(self, probability: Float[Tensor, "rows vocab"]) -> Int[Tensor, " rows"]:
        """A token for each row."""
        return drawn(probability, self.uniform(1)[:, 0])

    def select(self, rows: list[int]) -> None:
        """These rows go on."""
        self.generators, self.held = [self.generators[row] for row in rows], self.held[rows]


def _uniform(generator: torch.Generator, count: int) -> Float[Tensor, " count"]:
    return torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)
