"""How do a policy's networks learn to rank like a teacher? By listwise cross-entropy on frozen hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.policies.hidden_scorer import HiddenScorer
from ctxprune.precision import refuse_coarse
from ctxprune.replay import Context
from ctxprune.retrofitting import wrappers

EPSILON = 1e-6
"""Keeps a key that the teacher gives nothing from weighing infinitely."""


def networks(model) -> list[HiddenScorer]:
    """The scorers of a model whose policy has such; UserError for another."""
    rankings = [wrapper.rule.ranking for wrapper in wrappers(model)]
    found = [one.scorer for one in rankings if one is not None and isinstance(one.scorer, HiddenScorer)]
    if not found:
        raise UserError("this model's policy has no network to teach: retrofit it with FutureConfig or a neighbour")
    return found


def scores(model, context: Context) -> list[Float[Tensor, "batch context"]]:
    """What each layer's network says of each token of the contexts."""
    return [scorer(hidden) for scorer, hidden in zip(networks(model), context.hidden, strict=True)]


def fit(
    model,
    lessons: Iterable[tuple[Context, Float[Tensor, "layers batch context"]]],
    learning_rate: float = 3e-3,
    progress: Callable[[int, float], None] | None = None,
) -> None:
    """One step per lesson, a context and the teacher's scores of its tokens (not negative): cross-entropy between the
    teacher's distribution over tokens and the network's, in nats. progress(step, loss)."""
    parameters = [p for scorer in networks(model) for p in scorer.parameters()]
    refuse_coarse(parameters)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for step, (context, wanted) in enumerate(lessons):
        share = wanted.clamp(min=0) + EPSILON
        share = share / share.sum(-1, keepdim=True)
        with torch.enable_grad():
            said = torch.stack(scores(model, context))
            loss = -(share * said.log_softmax(-1)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, loss.item())
