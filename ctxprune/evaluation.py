"""How good is a pruned model on text it has not seen?

Perplexity and sparsity under the step function it is deployed with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ctxprune.drop_time import forward_with_drop_times
from ctxprune.retrofitting import mode, state_of, wrappers
from ctxprune.text.batches import IGNORED, Batch, targets
from ctxprune.visibility import visible_pairs

BUCKET = 0.75
"""Perplexity at context c is over the tokens predicted from more than 0.75 c and at most c tokens."""


@dataclass
class Evaluation:
    """What held-out text says of a model. Perplexities are exp(mean nats per predicted token)."""

    perplexity: float
    """Under the step function, over all predicted tokens."""
    perplexity_soft: float | None
    """Under the soft gates of the last training step; None where there are no gates."""
    perplexity_at: dict[str, float | None]
    """Per context length; None where no token has that much context."""
    sparsity: float
    """Share of the (query, previous key of the same document) pairs dropped, mean over layers."""
    sparsity_per_layer: list[float]
    sparsity_at: dict[str, float | None]
    """Share of the previous tokens dropped for queries at that much context, mean over layers."""
    tokens: int
    """Predicted tokens."""


@dataclass
class _Sums:
    nats: float = 0.0
    tokens: int = 0
    nats_at: dict[int, float] = field(default_factory=dict)
    tokens_at: dict[int, int] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    """Pairs kept in each batch, (layers,)."""
    pairs: int = 0
    kept_at: dict[int, float] = field(default_factory=dict)
    past_at: dict[int, int] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    model, batches: Iterable[Batch], contexts: list[int], progress: Callable[[int], None] | None = None
) -> Evaluation:
    """Score held-out batches (twice where there are gates: step function, and soft for the gap).

    contexts: lengths for perplexity_at and sparsity_at, in tokens. progress(done) counts batches.
    """
    model.eval()
    device = next(model.parameters()).device
    gated = any(wrapper.rule.gate is not None for wrapper in wrappers(model))
    sums, soft_nats = _Sums(), 0.0
    for done, batch in enumerate(batches):
        batch = Batch(batch.input_ids.to(device), batch.position_ids.to(device))
        wanted = targets(batch)
        taken, logits = forward_with_drop_times(model, batch.input_ids, position_ids=batch.position_ids)
        _add(sums, batch, wanted, taken, _nats(logits, wanted), contexts)
        if gated:
            with mode(model, "soft"):
                logits = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
            soft_nats += _nats(logits, wanted).sum().item()
            state_of(model).survival.clear()
        if progress is not None:
            progress(done + 1)
    return _evaluation(sums, soft_nats if gated else None, contexts)


def _nats(logits: Tensor, wanted: Tensor) -> Tensor:
    """Negative log likelihood per token, (batch, n); 0 where nothing is predicted."""
    loss = cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
    return loss.view_as(wanted).double()


def _add(sums: _Sums, batch: Batch, wanted: Tensor, taken, nats: Tensor, contexts: list[int]) -> None:
    predicted = wanted != IGNORED
    sums.nats += nats.sum().item()
    sums.tokens += int(predicted.sum())
    sums.kept.append(taken.kept_pairs().sum(1).double().cpu())
    sums.pairs += int(visible_pairs(taken.document_end).sum())
    previous = batch.position_ids
    # Keys each query sees, itself left out, mean over layers: (batch, n).
    live = taken.live_counts().double().mean(0) - 1
    for context in contexts:
        # The token at position p is predicted from p + 1 tokens: itself and its past.
        at = (previous + 1 > BUCKET * context) & (previous + 1 <= context)
        scored = at & predicted
        sums.nats_at[context] = sums.nats_at.get(context, 0.0) + nats[scored].sum().item()
        sums.tokens_at[context] = sums.tokens_at.get(context, 0) + int(scored.sum())
        sums.kept_at[context] = sums.kept_at.get(context, 0.0) + live[at].sum().item()
        sums.past_at[context] = sums.past_at.get(context, 0) + int(previous[at].sum())


def _evaluation(sums: _Sums, soft_nats: float | None, contexts: list[int]) -> Evaluation:
    per_layer = (1.0 - torch.stack(sums.kept).sum(0) / max(1, sums.pairs)).tolist()
    tokens = max(1, sums.tokens)
    return Evaluation(
        perplexity=math.exp(sums.nats / tokens),
        perplexity_soft=None if soft_nats is None else math.exp(soft_nats / tokens),
        perplexity_at={
            str(c): math.exp(sums.nats_at[c] / sums.tokens_at[c]) if sums.tokens_at[c] else None for c in contexts
        },
        sparsity=sum(per_layer) / len(per_layer),
        sparsity_per_layer=per_layer,
        sparsity_at={str(c): 1.0 - sums.kept_at[c] / sums.past_at[c] if sums.past_at[c] else None for c in contexts},
        tokens=sums.tokens,
    )
