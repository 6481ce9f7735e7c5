"""Can a network learn how much an input needs? A contextual bandit: each try draws one of a few budgets per layer, is
answered on what that leaves, and is paid in right answers less what keeping costs (ctxprune.teachers.reward).

An episode is one choice, so that nothing but the policy gradient is needed; the tries of an input are each other's
baseline. The ranking below the budgets is not learned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.policies.bandit import BanditScorer
from ctxprune.policies.budget import youngest_first
from ctxprune.replay import Context, read
from ctxprune.retrofitting import wrappers
from ctxprune.tasks.task import Task
from ctxprune.teachers.lessons import lesson
from ctxprune.teachers.reward import Cost, RewardConfig, by_reward, mean_share
from ctxprune.teachers.soft_mask import received

MET = 64
"""Contexts by which counts are scaled: networks see how far an input is from these, in spreads, or the differences
between inputs would be too small to be learned before one budget is settled on."""


def teach_budgets(
    model,
    task: Task,
    config: RewardConfig,
    *,
    cost: Cost = mean_share,
    protected: int = 0,
    recent: int = 0,
    progress: Callable[[int, float, float], None] | None = None,
) -> None:
    """Teach the networks of a model whose policy is `bandit`. protected, recent: first and last tokens of the context
    that are never dropped. progress(step, mean reward, mean share kept)."""
    scorers, draw = _choosers(model), torch.Generator().manual_seed(config.seed)
    rows = lesson(model, task, config.seed, 0, MET)
    for scorer, hidden in zip(scorers, read(model, rows.input_ids[:, : rows.end]).hidden, strict=True):
        scorer.meet(hidden)

    def act(context: Context) -> tuple[Tensor, Tensor]:
        liked = preferences(scorers, context)
        arm = drawn(liked.detach(), config.rollouts, draw)
        keep = torch.stack([kept(scorer, context, layer, arm[layer]) for layer, scorer in enumerate(scorers)])
        keep[..., :protected] = True
        keep[..., keep.shape[-1] - recent :] = True
        return keep, liked.log_softmax(-1)[:, None].expand(-1, len(arm[0]), -1, -1).gather(-1, arm[..., None]).sum(
            (0, -1)
        )

    parameters = [p for scorer in scorers for p in scorer.parameters()]
    by_reward(model, task, config, parameters, act, cost=cost, progress=progress)


def preferences(scorers: list[BanditScorer], context: Context) -> Float[Tensor, "layers batch arms"]:
    """Each layer's logits of its budgets, as at the end of these contexts; differentiable."""
    length = torch.full((len(context.ids),), context.ids.shape[1], device=context.ids.device)
    return torch.stack(
        [
            scorer.preferences(scorer.counts(hidden).sum(-1), length)
            for scorer, hidden in zip(scorers, context.hidden, strict=True)
        ]
    )


def drawn(
    liked: Float[Tensor, "layers batch arms"], tries: int, draw: torch.Generator
) -> Int[Tensor, "layers tries batch"]:
    """Which budget each try has."""
    layers, batch, _ = liked.shape
    odds = liked.float().softmax(-1).flatten(0, 1).cpu()  # where the generator is
    found = torch.multinomial(odds, tries, replacement=True, generator=draw).to(liked.device)
    return found.view(layers, batch, tries).transpose(1, 2)


def kept(
    scorer: BanditScorer, context: Context, layer: int, arm: Int[Tensor, "tries batch"]
) -> Bool[Tensor, "tries batch n"]:
    """The keys that stay under these budgets."""
    order = youngest_first(received(context, layer))
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    length = torch.full(arm.shape[1:], order.shape[1], device=arm.device)
    count = scorer.keys(length).expand(len(arm), -1, -1).gather(-1, arm[..., None])
    return rank < count


def _choosers(model) -> list[BanditScorer]:
    rankings = [wrapper.rule.ranking for wrapper in wrappers(model)]
    found = [one.scorer for one in rankings if one is not None and isinstance(one.scorer, BanditScorer)]
    if not found:
        raise UserError("this model's policy chooses no budgets: retrofit it with BanditConfig")
    return found
