"""What has to happen beside a training loop, so that gates learn to drop? A penalty per batch, a step per update.

The pipelines train with it, and so can any loop of torch, `accelerate` or transformers' Trainer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

from ctxprune.budget import SparsityController, calibrate
from ctxprune.drop_time import DropTimes
from ctxprune.errors import UserError
from ctxprune.objective import alpha_at, kept_share
from ctxprune.retrofitting import gate_parameters, state_of
from ctxprune.text.batches import Batch
from ctxprune.visibility import visible_pairs

MEASURE_EVERY = 4
"""Steps between two measurements of the sparsity: one costs about a tenth of a step."""
SHARP_ALPHA = 4.0
"""From here on soft and hard sparsity differ by less than half a point, and the controller watches the hard one."""


class PruningSchedule:
    """Sharpens the gates and steers the weight of their penalty over a training (arXiv 2305.15805, section 3).

    Add `penalty()` to the loss of every batch, call `step()` after every optimizer step, as with a learning-rate
    schedule, and `settle` at the end. Under torch.distributed every rank has a schedule of its own, and all agree.
    """

    def __init__(
        self,
        model,
        steps: int,
        sparsity: float | None = None,
        *,
        gamma: float = 0.0,
        alpha_start: float = 1.001,
        alpha_end: float = 8.0,
        alpha_steps: float = 0.8,
    ):
        """model: retrofitted with GateConfig; steps: optimizer steps of the whole training.

        sparsity: share of the context to be dropped at the end, in (0, 1), which a controller of the penalty's weight
        reaches; None: the weight is `gamma` throughout, as in the paper. alpha_start, alpha_end: sharpness of the soft
        gates, 1 is the logistic function; alpha_steps: share of the training over which it rises. UserError for a model
        without gates, and for settings out of range.
        """
        if not gate_parameters(model):
            raise UserError("this model has no gates to train: ctxprune.retrofit(model, ctxprune.GateConfig()) first")
        if steps < 1:
            raise UserError(f"steps is {steps}: give the optimizer steps of the training, at least 1")
        if sparsity is not None and not 0.0 < sparsity < 1.0:
            raise UserError(f"sparsity is {sparsity}: give the share of the context to drop, between 0 and 1")
        self.model = model
        self.steps = steps
        self.target = sparsity
        self.controller = None if sparsity is None else SparsityController(sparsity)
        self.gamma = gamma if self.controller is None else self.controller.gamma
        self.sparsity: float | None = None
        """Of the last step, under the step function, where it was measured."""
        self.sparsity_soft: float | None = None
        """The same under the soft gates."""
        self.goal: float | None = None
        """What the controller asked of the last step."""
        self.done = 0
        self._alphas, self._kept = (alpha_start, alpha_end, alpha_steps), torch.zeros(())
        self._begin()

    def penalty(self, weight: float = 1.0) -> Float[Tensor, ""]:
        """gamma times the share of visible pairs that the gates kept in the forward pass just done; differentiable.

        weight: what this rank's pairs count for, where ranks have unequal numbers of them. UserError in eval mode,
        where gates are a step function and have no gradient.
        """
        if not state_of(self.model).survival or not self.model.training:
            raise UserError("no soft gates have been passed: call model.train(), then the model, then penalty()")
        kept = kept_share(self.model)
        self._kept = kept.detach()
        return self.gamma * weight * kept

    def step(self) -> None:
        """After an optimizer step: measures every few steps, takes the next gamma and alpha. Nothing moves any more
        once `steps` are done."""
        if self.done == self.steps:
            return
        self.sparsity = self.sparsity_soft = None
        state = state_of(self.model)
        if state.record:
            self.sparsity, self.sparsity_soft = self._measured(state)
            if self.controller is not None:
                # Near alpha = 1 the step function drops nothing yet while the soft gates already decay: watching it
                # then drives gamma up, and the sparsity overshoots once the gates sharpen.
                watched = self.sparsity if state.alpha >= SHARP_ALPHA else self.sparsity_soft
                self.gamma = self.controller.update(watched, self._progress)
        if self.controller is not None:
            self.goal = self.controller.goal(self._progress)
        state.record = None
        self.done += 1
        if self.done < self.steps:
            self._begin()

    def settle(self, input_ids: Iterable[Int64[Tensor, "batch n"]]) -> float:
        """Shift every threshold by one common amount, so that on these rows, a document each, exactly the target is
        dropped; returns the shift. UserError without a target, and if no shift reaches it."""
        if self.target is None:
            raise UserError("the schedule has no sparsity to settle on: give it one")
        batches = [Batch(ids, torch.arange(ids.shape[1]).expand(ids.shape)) for ids in input_ids]
        if not batches:
            raise UserError("there are no rows to settle on: give some batches of training text")
        return calibrate(self.model, batches, self.target)

    @property
    def _progress(self) -> float:
        return self.done / self.steps

    def _begin(self) -> None:
        """Before the forward pass of a step. Not within it: activation checkpointing computes it again."""
        start, end, share = self._alphas
        state = state_of(self.model)
        state.alpha = alpha_at(self._progress / share, start, end)
        state.record = {} if self.done % MEASURE_EVERY == 0 or self.done + 1 == self.steps else None

    def _measured(self, state) -> tuple[float, float]:
        """Sparsity of the step just taken, (step function, soft gates), over the rows of all ranks."""
        end = state.documents.end
        taken, pairs = DropTimes(state.recorded(), end), visible_pairs(end).sum().double()
        counts = torch.stack([taken.kept_pairs().double().sum() / state.layers, self._kept.double() * pairs, pairs])
        if dist.is_initialized():
            dist.all_reduce(counts)
        hard, soft = (1.0 - counts[:2] / counts[2].clamp(min=1)).tolist()
        return hard, soft
