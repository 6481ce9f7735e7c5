"""Can the loss itself say what to keep? Scores are softened to a mask on the context's keys, and what is answered less
what is kept is followed by its gradient (LTP, arXiv 2107.00910). There the model learns along, and on under hard
thresholds; here it stays as it is.

The mask stands inside the attention, as log sigmoid(score / temperature) on its logits: a key that is half gone has
half the weight before the softmax, and one that is gone counts for nothing there, as when it is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from ctxprune.errors import UserError
from ctxprune.policies.hidden_scorer import HiddenScorer
from ctxprune.policies.ltp import LTPScorer
from ctxprune.policies.scorer import attention
from ctxprune.precision import refuse_coarse
from ctxprune.replay import Context, read, resume
from ctxprune.retrofitting import wrappers
from ctxprune.tasks.scoring import loss as task_loss
from ctxprune.tasks.task import Task, TaskBatch
from ctxprune.teachers.lessons import lesson


@dataclass(frozen=True)
class SoftMaskConfig:
    """How thresholds and networks learn."""

    target: float = 0.25
    """Share of the context that the mask is to keep, in (0, 1)."""
    price: float = 30.0
    """Nats per squared share that it keeps more or less."""
    temperature: float = 0.1
    """Of thresholds on attention, in units of its spread over a first batch; networks give logits, whose is 1."""
    rows: int = 32
    """Inputs per step."""
    steps: int = 300
    """Steps of Adam."""
    learning_rate: float = 0.01
    """Of Adam, in units of that spread for thresholds."""
    seed: int = 0
    """Of the rows that are read."""

    def __post_init__(self):
        if not 0.0 < self.target < 1.0:
            raise UserError(f"target is {self.target}: give a share in (0, 1)")
        for name in ("price", "temperature"):
            if not getattr(self, name) > 0.0:
                raise UserError(f"{name} is {getattr(self, name)}: give a number above 0")
        for name in ("rows", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")


def soften(
    model,
    task: Task,
    config: SoftMaskConfig,
    *,
    protected: int = 0,
    recent: int = 0,
    progress: Callable[[int, float, float], None] | None = None,
) -> None:
    """Teach the scorers of a model whose policy is `ltp` or a network's. protected, recent: first and last tokens of
    the context that are always seen. progress(step, loss of the answers in nats, share of the mask)."""
    scorers = [_teachable(wrapper) for wrapper in wrappers(model)]
    refuse_coarse(p for scorer in scorers for p in scorer.parameters())
    rows = lesson(model, task, config.seed, 0, config.rows)
    with torch.no_grad():
        spread = [float(score.std()) for score in softened(scorers, _context(model, rows))]
    thresholds = [isinstance(scorer, LTPScorer) for scorer in scorers]
    units = [config.temperature * std if one else 1.0 for std, one in zip(spread, thresholds, strict=True)]
    groups = [
        {"params": list(scorer.parameters()), "lr": config.learning_rate * (std if one else 1.0)}
        for scorer, std, one in zip(scorers, spread, thresholds, strict=True)
    ]
    optimizer = torch.optim.Adam(groups)
    for step in range(config.steps):
        rows = lesson(model, task, config.seed, step, config.rows)
        context = _context(model, rows)
        with torch.enable_grad():
            logs = [logsigmoid(score / unit) for score, unit in zip(softened(scorers, context), units, strict=True)]
            end = context.ids.shape[1]
            place = torch.arange(end, device=context.ids.device)
            seen = (place < protected) | (place >= end - recent)
            share = torch.stack([log[:, ~seen].exp().mean() for log in logs]).mean()
            bias = [log.masked_fill(seen, 0.0)[:, None, None] for log in logs]
            said = resume(model, context, rows.input_ids[:, end:], bias)
            follows = TaskBatch(
                rows.input_ids[:, end:], rows.answers[:, end:], rows.questions[:, end:], rows.context_end
            )
            lost = task_loss(said, follows)
            optimizer.zero_grad()
            (lost + config.price * (share - config.target) ** 2).backward()
        optimizer.step()
        if progress is not None:
            progress(step + 1, lost.item(), share.item())
    model.zero_grad()


def softened(scorers: list[HiddenScorer | LTPScorer], context: Context) -> list[Float[Tensor, "batch context"]]:
    """What each layer's scorer says of every token of the contexts at their end, differentiable."""
    found = []
    for layer, scorer in enumerate(scorers):
        if isinstance(scorer, HiddenScorer):
            found.append(scorer(context.hidden[layer]))
        else:
            found.append(received(context, layer) - scorer.threshold)
    return found


@torch.no_grad()
def received(context: Context, layer: int) -> Float[Tensor, "batch context"]:
    """Attention that each key got in the context, mean over heads and the queries that could see it."""
    query, key = context.queries[layer], context.keys[layer]
    n = key.shape[2]
    seen = torch.ones(n, n, dtype=torch.bool, device=key.device).tril()
    shares = attention(query, key, seen[None, None], context.scales[layer]).mean(1).sum(1)
    return shares / torch.arange(n, 0, -1, device=key.device)


def _context(model, rows: TaskBatch) -> Context:
    return read(model, rows.input_ids[:, : rows.end])


def _teachable(wrapper) -> HiddenScorer | LTPScorer:
    ranking = wrapper.rule.ranking
    if ranking is None or not isinstance(ranking.scorer, HiddenScorer | LTPScorer):
        raise UserError(
            "a soft mask teaches thresholds and networks: retrofit the model with LTPConfig or FutureConfig"
        )
    return ranking.scorer
