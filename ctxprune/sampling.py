"""How is the next token picked?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune.errors import UserError


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
    exact = torch.promote_types(logits.dtype, torch.float32)
    if how.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(exact)
    scores = logits.to(exact) / how.temperature
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
    chosen = logits.argmax(-1)
    for row, (own, generator) in enumerate(zip(how, generators, strict=True)):
        if own.temperature > 0:
            chosen[row] = torch.multinomial(probabilities(logits[row], own), 1, generator=generator)[0]
    return chosen
