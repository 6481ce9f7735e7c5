"""How do scores reach the policy `given`? They are handed over for as long as a batch is at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.policies.given import GivenScorer
from ctxprune.retrofitting import wrappers


@contextmanager
def given(model, scores: Float[Tensor, "layers batch positions"]) -> Iterator[None]:
    """Within the block layers rank the batch's keys by these scores, higher = keep; keys behind them stay.

    Raises UserError if the model's policy is another one or has another number of layers, and for scores of
    another form or not a number.
    """
    rankings = [wrapper.rule.ranking for wrapper in wrappers(model)]
    scorers = [one.scorer for one in rankings if one is not None and isinstance(one.scorer, GivenScorer)]
    if not scorers:
        raise UserError(
            "scores are handed over to the policy given: retrofit the model with ctxprune.policies.GivenConfig"
        )
    if scores.ndim != 3 or bool(scores.isnan().any()):
        raise UserError("scores are (layers, batch, positions), none of them not a number: give such a tensor")
    if len(scorers) != len(scores):
        raise UserError(f"scores are of {len(scores)} layers, the model has {len(scorers)}: give one set per layer")
    for scorer, own in zip(scorers, scores, strict=True):
        scorer.table = own
    try:
        yield
    finally:
        for scorer in scorers:
            scorer.table = None
