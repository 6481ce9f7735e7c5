"""What is trained? Predict the next token, keep little, and (optionally) stay close to the dense model."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ctxprune.retrofitting import state_of
from ctxprune.text.batches import IGNORED


def next_token_loss(logits: Float[Tensor, "batch n vocab"], targets: Int[Tensor, "batch n"]) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over the tokens whose target is not IGNORED."""
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def kept_share(model) -> Float[Tensor, ""]:
    """Mean over layers of the mean of I over the visible pairs: the paper's regulariser (arXiv 2305.15805, eq. 7) with
    the constant triangle left out. Of the last soft forward pass; differentiable."""
    return torch.stack(list(state_of(model).survival.values())).mean()


def distillation_loss(
    logits: Float[Tensor, "batch n vocab"],
    teacher_logits: Float[Tensor, "batch n vocab"],
    targets: Int[Tensor, "batch n"],
) -> Float[Tensor, ""]:
    """KL(teacher || model) in nats, mean over the predicted tokens."""
    predicted = targets != IGNORED
    student = log_softmax(logits.float()[predicted], -1)
    teacher = log_softmax(teacher_logits.float()[predicted], -1)
    return kl_div(student, teacher, reduction="batchmean", log_target=True)


def alpha_at(progress: float, start: float, end: float) -> float:
    """Sharpness after a share `progress` of the schedule: end + (start - end)/2 (1 + cos(pi progress)), then constant
    (arXiv 2305.15805, section 3)."""
    progress = min(1.0, max(0.0, progress))
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * progress))
