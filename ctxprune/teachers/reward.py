"""Can an agent learn what to keep by trying? REINFORCE over single tokens, the language model frozen (TR-BERT, arXiv
2105.11618).

Each layer's network gives every token of the context the odds of keeping it. Several rollouts of the same input draw
keep or drop; what follows is answered on what is left; the reward is the share of right answers less what keeping
costs. A rollout's advantage is its reward less the mean of the others of its input (leave-one-out, arXiv 2402.14740),
so that easy and hard inputs teach alike. The context is read once for all rollouts, and these are the rows of one
forward: on one machine that is faster than a process for each, which would read the context again and wait for the
slowest. What runs in parallel is whole lessons, the points of a study.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.precision import refuse_coarse
from ctxprune.replay import Context, read, resume
from ctxprune.tasks.scoring import answered
from ctxprune.tasks.task import Task, TaskBatch
from ctxprune.teachers.fit import networks, scores
from ctxprune.teachers.lessons import lesson

RISE, LEAST, MOST = 0.15, 1e-3, 10.0
"""Relative change of the price per step and share that is kept too much, and its limits."""


@dataclass(frozen=True)
class RewardConfig:
    """How an agent learns."""

    price: float = 0.3
    """What keeping every token costs, in shares of right answers; one that keeps half pays half."""
    target: float | None = None
    """Share to keep: the price then only starts there and rises or falls until that share is kept (dual ascent)."""
    entropy: float = 0.0
    """What being undecided is worth, in shares of right answers per nat (arXiv 1602.01783): few actions are settled on
    before features are learned, unless that has a price."""
    rollouts: int = 8
    """Tries per input."""
    rows: int = 16
    """Inputs per step."""
    steps: int = 300
    """Steps of Adam, at most."""
    seconds: float | None = None
    """Wall clock after which learning stops wherever it is; nothing else depends on it. None: after `steps` only."""
    learning_rate: float = 3e-3
    """Of Adam."""
    seed: int = 0
    """Of the draws and of the rows that are read."""

    def __post_init__(self):
        if self.rollouts < 2:
            raise UserError(f"rollouts is {self.rollouts}: give at least 2, each is judged by the others")
        for name in ("rows", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.seconds is not None and not self.seconds > 0.0:
            raise UserError(f"seconds is {self.seconds}: give a number above 0, or none for no limit")
        for name in ("price", "entropy"):
            if not getattr(self, name) >= 0.0:
                raise UserError(f"{name} is {getattr(self, name)}: give 0 or more")
        if self.target is not None and not (0.0 < self.target < 1.0 and self.price > 0.0):
            raise UserError(f"target is {self.target}, price {self.price}: give a share in (0, 1) and a price above 0")


Cost = Callable[[Float[Tensor, "layers rows"]], Float[Tensor, " rows"]]
"""What keeping these shares of the context costs, in the same unit as `price`: their mean, or measured time as a
share of that of keeping all (ctxprune.teachers.latency)."""

Act = Callable[[Context], tuple[Bool[Tensor, "layers tries batch n"], Float[Tensor, "tries batch"]]]
"""What each try keeps of contexts that were read, and the logarithm of its chance, differentiable."""


def mean_share(shares: Float[Tensor, "layers rows"]) -> Float[Tensor, " rows"]:
    """The plain cost: every layer's keys cost the same."""
    return shares.mean(0)


def reinforce(
    model,
    task: Task,
    config: RewardConfig,
    *,
    cost: Cost = mean_share,
    protected: int = 0,
    recent: int = 0,
    progress: Callable[[int, float, float], None] | None = None,
) -> None:
    """Teach the networks of a model whose policy is `agent`. protected, recent: first and last tokens of the context
    that are never dropped. progress(step, mean reward, mean share kept)."""
    draw = torch.Generator().manual_seed(config.seed)

    def act(context: Context) -> tuple[Tensor, Tensor]:
        odds = torch.stack(scores(model, context))
        keep = _draw(odds.detach(), config.rollouts, draw)
        last = keep.shape[-1] - recent
        keep[..., :protected], keep[..., last:] = True, True
        chance = torch.where(keep, odds[:, None], -odds[:, None]).sigmoid().clamp(min=1e-8).log()
        # Averaged over tokens, so that the step does not grow with the context.
        return keep, chance[..., protected:last].mean((0, -1))

    parameters = [p for scorer in networks(model) for p in scorer.parameters()]
    by_reward(model, task, config, parameters, act, cost=cost, progress=progress)


def by_reward(
    model,
    task: Task,
    config: RewardConfig,
    parameters: Iterable[Tensor],
    act: Act,
    *,
    cost: Cost = mean_share,
    progress: Callable[[int, float, float], None] | None = None,
) -> None:
    """Policy gradient on these parameters, whatever is decided: single tokens (reinforce) or budgets (teachers.bandit).
    progress as in reinforce."""
    price, begin, parameters = config.price, monotonic(), list(parameters)
    refuse_coarse(parameters)
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
    for step in range(config.steps):
        rows = lesson(model, task, config.seed, step, config.rows)
        context = read(model, rows.input_ids[:, : rows.end])
        with torch.enable_grad():
            keep, chance = act(context)
        reward, share = rewards(model, rows, context, keep, price, cost)
        reward = reward - config.entropy * chance.detach()
        # Leave-one-out: the baseline of a rollout is the mean of the others of its input.
        advantage = (reward - reward.mean(0)) * config.rollouts / (config.rollouts - 1)
        with torch.enable_grad():
            loss = -(advantage.detach() * chance).mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        if config.target is not None:
            # Slower than the networks learn, or price and share would swing.
            price = min(MOST, max(LEAST, price * math.exp(RISE * (share.mean().item() - config.target))))
        if progress is not None:
            progress(step + 1, reward.mean().item(), share.mean().item())
        if config.seconds is not None and monotonic() - begin >= config.seconds:
            return


@torch.no_grad()
def rewards(
    model, rows: TaskBatch, context: Context, keep: Bool[Tensor, "layers tries batch n"], price: float, cost: Cost
) -> tuple[Float[Tensor, "tries batch"], Float[Tensor, "tries batch"]]:
    """Reward of each try at each row, and the share of the context that it kept, mean over layers."""
    _layers, tries, batch, length = keep.shape
    row = torch.arange(batch, device=keep.device).repeat(tries)
    bias = [
        torch.zeros(tries * batch, 1, 1, length, device=keep.device).masked_fill(
            ~one.flatten(0, 1)[:, None, None], -torch.inf
        )
        for one in keep
    ]
    said = resume(model, context, rows.input_ids[row, length:], bias, row)
    right = answered(said, _what_follows(rows, row, length)).nanmean(1)
    shares = keep.double().mean(-1).flatten(1).float()
    return (right - price * cost(shares)).view(tries, batch), shares.mean(0).view(tries, batch)


def _draw(odds: Tensor, tries: int, generator: torch.Generator) -> Bool[Tensor, "layers tries batch n"]:
    shape = (odds.shape[0], tries, *odds.shape[1:])
    return torch.rand(shape, generator=generator).to(odds.device) < odds.sigmoid()[:, None]


def _what_follows(rows: TaskBatch, row: Int[Tensor, " many"], length: int) -> TaskBatch:
    """The questions of these rows alone."""
    return TaskBatch(
        rows.input_ids[row, length:], rows.answers[row, length:], rows.questions[row, length:], rows.context_end[row]
    )
