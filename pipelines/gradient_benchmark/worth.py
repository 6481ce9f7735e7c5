"""Do gradients rank keys as leaving them out does, and do cheaper scores? Rank correlations on windows of real text."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune.policies.scorer import attention
from ctxprune.replay import Context, Resuming, read, resume
from ctxprune.tasks.scoring import spearman
from ctxprune.teachers.edge_gradient import edge_gradients, left_out

AIM = 0.8
"""Mean rank correlation over all layers from which gradients may stand for leaving keys out."""
GRADIENTS = "edge gradients"
POSITIVE = "edge gradients, positive part"
SEED = 0
WINDOWS = 8
"""Windows at a time."""


@dataclass
class _Watched(Resuming):
    """Attends as usual, and writes down what cheap scores make of the context's keys, each (batch, keys)."""

    queries: Tensor
    """Those of the context (batch, heads, keys, width)."""
    got: list[dict[str, Tensor]]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        n, heads = self.keys.shape[2], query.shape[1]
        last = attention(query, torch.cat([self.keys, key], 2), self.seen(query)[None, None], scale)[..., :n].sum(2)
        causal = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()[None, None]
        before = attention(self.queries, self.keys, causal, scale).sum(2)
        lengths = self.values.norm(dim=-1).repeat_interleave(heads // self.keys.shape[1], 1)
        self.got.append(
            {
                # H2O (arXiv 2306.14048): all queries so far.
                "accumulated attention": (before + last).mean(1),
                # SnapKV (arXiv 2404.14469) without its pooling: the queries that gradients look at.
                "attention of the queries": last.mean(1),
                # VATP (arXiv 2406.12335) weighs by the L1 norm; here the norm that a head's output is measured by.
                "value-weighted attention": (last * lengths).mean(1),
                # Low norms stay (arXiv 2406.11430).
                "key norm": -self.keys.norm(dim=-1).mean(1),
            }
        )
        return super().attend(query, key, value, scale)


def records(model, ids: Int[Tensor, "windows n"], context: int) -> Iterator[dict[str, object]]:
    """A record per score, of the keys of each window's first `context` tokens for the predictions at the tokens after.

    signed: rank correlation with how much the predicted logits fall without a key (negative where they rise); size: of
    the magnitudes of both, the fair question to scores that have no sign. Each over all layers' keys together and by
    layer: mean, lowest and highest over windows. In float64: leaving a key out may move a logit by less than float32
    resolves.
    """
    model = copy.deepcopy(model).double().requires_grad_(False)
    chunks = [measured(model, rows[:, :context], rows[:, context:]) for rows in ids.split(WINDOWS)]
    truth = torch.cat([one[0] for one in chunks], 1)
    for name in chunks[0][1]:
        scores = torch.cat([found[name] for _, found in chunks], 1)
        record: dict[str, object] = {"kind": "gradients", "part": "worth", "score": name}
        record |= {"queries": ids.shape[1] - context, "context": context, "windows": len(ids)}
        record |= {"signed": agreement(scores, truth), "size": agreement(scores, truth, size=True)}
        yield record | ({"aim": AIM} if name == GRADIENTS else {})


def measured(
    model, before: Int[Tensor, "batch context"], follows: Int[Tensor, "batch n"]
) -> tuple[Float[Tensor, "layers batch context"], dict[str, Float[Tensor, "layers batch context"]]]:
    """What leaving each key out does, and what each score says."""
    context = read(model, before)
    keys = torch.arange(before.shape[1], device=before.device)
    truth = torch.stack([left_out(model, context, follows, layer, keys) for layer in range(context.layers)])
    scores = {GRADIENTS: edge_gradients(model, context, follows, signed=True)}
    scores[POSITIVE] = edge_gradients(model, context, follows)
    return truth, scores | cheap(model, context, follows)


@torch.no_grad()
def cheap(model, context: Context, follows: Int[Tensor, "batch n"]) -> dict[str, Float[Tensor, "layers batch context"]]:
    """Scores that need no gradient, and lots."""
    got: list[dict[str, Tensor]] = []

    def call(keys: Tensor, values: Tensor, bias: Tensor | None) -> Resuming:
        return _Watched(keys, values, bias, context.queries[len(got)], got)

    resume(model, context, follows, [None] * context.layers, calls=call)
    found = {name: torch.stack([layer[name] for layer in got]) for name in got[0]}
    lots = torch.rand(found["key norm"].shape, generator=torch.Generator().manual_seed(SEED))
    return found | {"random": lots.to(context.ids.device)}


def agreement(
    scores: Float[Tensor, "layers batch context"], truth: Float[Tensor, "layers batch context"], size: bool = False
) -> dict[str, object]:
    """Rank correlation per window, summed up: over all layers' keys together, and by layer. size: of the magnitudes of
    the truth and of whatever score has a sign to lose."""
    if size:
        # A score below zero throughout has an order, not a sign.
        scores, truth = scores if (scores <= 0).all() else scores.abs(), truth.abs()
    windows = range(truth.shape[1])
    by_layer = [[spearman(scores[layer, w], truth[layer, w]) for w in windows] for layer in range(len(truth))]
    together = [spearman(scores[:, w].flatten(), truth[:, w].flatten()) for w in windows]
    return {"all": _spread(together), "layers": [_spread(one) for one in by_layer]}


def _spread(values: list[float]) -> dict[str, float]:
    found = torch.tensor(values, dtype=torch.float64)
    return {"mean": found.mean().item(), "lowest": found.min().item(), "highest": found.max().item()}
