"""How well was a task answered, and with what? Accuracy per row, differences and their spread, keep-sets.

Rows are the unit of every interval: questions of one row share a context and are not independent.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.tasks.task import TaskBatch
from ctxprune.text.batches import IGNORED


def answered(logits: Float[Tensor, "batch n classes"], batch: TaskBatch) -> Float[Tensor, "batch questions"]:
    """1 where a question is answered, 0 where not, NaN where a row has fewer questions than the most of the batch.

    logits: what a model says at each position of `batch.input_ids`; those of a classifier of whole rows, [batch,
    classes], may be given as `logits[:, None].expand(-1, n, -1)`. A question counts when each of its tokens is the
    most likely one there, given the right tokens before it.
    """
    right = torch.zeros_like(batch.answers, dtype=torch.bool)
    counted = batch.questions >= 0
    right[counted] = logits[counted].argmax(-1) == batch.answers[counted]
    most = int(batch.questions.max()) + 1
    of = torch.where(counted, batch.questions, most)  # the last column takes what is not counted
    asked, missed = (torch.zeros(len(of), most + 1, device=of.device) for _ in range(2))
    asked.scatter_add_(1, of, torch.ones_like(asked[:, :1]).expand_as(of))
    missed.scatter_add_(1, of, (~right).float())
    share = torch.where(asked > 0, (missed == 0).float(), torch.nan)
    return share[:, :most]


def score(logits: Float[Tensor, "batch n classes"], batch: TaskBatch) -> Float[Tensor, " batch"]:
    """Accuracy of each row, 0 to 1: the share of its questions that are `answered`; NaN for a row without any."""
    return answered(logits, batch).nanmean(1)


def loss(logits: Float[Tensor, "batch n classes"], batch: TaskBatch) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over all answers, counted or not."""
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch.answers.flatten(), ignore_index=IGNORED
    )


def paired_bootstrap(
    a: Float[Tensor, " rows"], b: Float[Tensor, " others"], seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """(mean of a - b, and its 95 % interval): a and b are two policies' scores on the same rows, in the same order.

    Percentile bootstrap (Efron 1979) over rows. Raises UserError for scores that are not paired, none at all, or NaN.
    """
    if a.shape != b.shape or not len(a) or resamples < 1:
        raise UserError(f"{len(a)} and {len(b)} scores, {resamples} resamples: give the same rows twice, and 1 or more")
    difference = (a.double() - b.double()).cpu()
    if difference.isnan().any():
        raise UserError("a score is NaN: leave rows without questions out of both sides")
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [
            difference[torch.randint(len(difference), (len(difference),), generator=generator)].mean()
            for _ in range(resamples)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return difference.mean().item(), low, high


def keep_set(
    kept: Bool[Tensor, "batch n"], batch: TaskBatch
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """(precision, recall) of each row's kept keys of the context, against those that are needed.

    kept: which keys stand after compression; positions from `context_end` on, and padding, do not count. Precision is
    NaN where nothing is kept, recall where nothing is needed. Raises UserError where the task does not know its truth.
    """
    if batch.needed is None:
        raise UserError("this task does not know which tokens are needed: take a synthetic one")
    context = in_context(batch)
    hit = (kept & batch.needed & context).sum(1)
    return hit / (kept & context).sum(1), hit / batch.needed.sum(1)


def in_context(batch: TaskBatch) -> Bool[Tensor, "batch n"]:
    """Which positions are tokens of the context."""
    column = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    inside = column < batch.context_end[:, None]
    return inside if batch.attention_mask is None else inside & batch.attention_mask.bool()


def pearson(x: Float[Tensor, " rows"], y: Float[Tensor, " rows"]) -> float:
    """Correlation of two measures of the same rows, e.g. kept tokens and difficulty, -1 to 1; NaN for a constant."""
    x, y = (values.double() - values.double().mean() for values in (x, y))
    return ((x * y).sum() / (x.norm() * y.norm())).item()


def spearman(x: Float[Tensor, " rows"], y: Float[Tensor, " rows"]) -> float:
    """Rank correlation, -1 to 1: `pearson` of the ranks, equal values sharing their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    first = count.cumsum(0) - count
    return (first + (count - 1) / 2)[place].double()
