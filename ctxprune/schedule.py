"""What has to happen beside a training loop, so that gates learn to drop? A penalty per batch, a step per update.

The pipelines train with it, and so can any loop of torch, `accelerate` or transformers' Trainer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

from ctxprune.budget import SparsityController, calibrate
from ctxprune.drop_time import DropTimes
from ctxprune.errors import UserError
from ctxprune.kernels.checks import MAX_ALPHA
from ctxprune.objective import alpha_at, kept_share
from ctxprune.precision import refuse_coarse
from ctxprune.retrofitting import gate_parameters, state_of, wrappers
from ctxprune.text.batches import Batch
from ctxprune.visibility import visible_pairs

MEASURE_EVERY = 4
"""Steps between two measurements of the sparsity: one costs about a tenth of a step."""
SHARP_ALPHA = 4.0
"""From here on soft and hard sparsity differ by less than half a point, and the controller watches the hard one."""


class PruningSchedule:
    """Sharpens the gates and steers the weight of their penalty over a training (arXiv 2305.15805, section 3).

    Add `penalty()` to the loss of every batch, call `step()` after every optimizer step, as with a learning-rate
    schedule, and `settle` at the end. Under torch.distributed every rank has a schedule of its own, and all agree. A
    training that is resumed needs `state_dict`, as that of a learning-rate schedule.
    """

    def __init__(
        self,
        model,
        steps: int,
        sparsity: float | None = None,
        *,
        gamma: float | None = None,
        alpha_start: float = 1.001,
        alpha_end: float = 8.0,
        alpha_steps: float = 0.8,
    ):
        """model: retrofitted with GateConfig; steps: optimizer steps of the whole training.

        sparsity: share of the context to be dropped at the end, in (0, 1), which a controller of the penalty's weight
        reaches; or gamma: that weight, the same throughout, as in the paper. alpha_start, alpha_end: sharpness of the
        soft gates, from 1, the logistic function, to MAX_ALPHA; alpha_steps: share of the training over which it rises.
        UserError for a model without gates, and for settings out of range.
        """
        if not gate_parameters(model):
            raise UserError("this model has no gates to train: ctxprune.retrofit(model, ctxprune.GateConfig()) first")
        if steps < 1:
            raise UserError(f"steps is {steps}: give the optimizer steps of the training, at least 1")
        if (sparsity is None) == (gamma is None):
            raise UserError("give a sparsity to reach, or the penalty's weight gamma: one of the two")
        if gamma is not None and not 0.0 <= gamma < math.inf:
            raise UserError(f"gamma is {gamma}: give a weight of 0 or more")
        if not (1.0 <= alpha_start <= alpha_end <= MAX_ALPHA and 0.0 < alpha_steps <= 1.0):
            given = f"alpha_start is {alpha_start}, alpha_end {alpha_end}, alpha_steps {alpha_steps}"
            raise UserError(f"{given}: give 1 <= start <= end <= {MAX_ALPHA:g}, and steps in (0, 1]")
        if sparsity is not None and not 0.0 < sparsity < 1.0:
            raise UserError(f"sparsity is {sparsity}: give the share of the context to drop, between 0 and 1")
        coarse = [p for p in gate_parameters(model) if torch.finfo(p.dtype).bits < 32]
        if coarse and not dist.is_initialized():  # DeepSpeed keeps float32 ones beside them
            warnings.warn(f"gates in {coarse[0].dtype} do not move by small steps: train model.float()", stacklevel=2)
        self.model = model
        self.steps = steps
        self.target = sparsity
        self.controller = None if sparsity is None else SparsityController(sparsity)
        self.gamma = gamma or 0.0 if self.controller is None else self.controller.gamma
        self.sparsity: float | None = None
        """Of the last step, under the step function, where it was measured."""
        self.sparsity_soft: float | None = None
        """The same under the soft gates."""
        self.goal: float | None = None
        """What the controller asked of the last step."""
        self.done = 0
        self._alphas = alpha_start, alpha_end, alpha_steps
        self._passed: tuple[DropTimes, Tensor] | None = None
        """Drop times and kept share of the step's first pass, where they are measured."""
        self._begin()

    def penalty(self, weight: float = 1.0) -> Float[Tensor, ""]:
        """gamma times the share of visible pairs that the gates kept in the forward pass just done; differentiable.

        weight: what this rank's pairs count for, where ranks have unequal numbers of them. UserError in eval mode,
        where gates are a step function and have no gradient.
        """
        if not state_of(self.model).survival or not self.model.training:
            raise UserError("no soft gates have been passed: call model.train(), then the model, then penalty()")
        kept, state = kept_share(self.model), state_of(self.model)
        if state.record:
            # Taken now: what is read before step(), by a teacher or a validation, is not this pass, and the backward
            # pass of a checkpointed one computes it again, last layer first.
            self._passed = DropTimes(state.recorded(), state.documents.end), kept.detach()
            state.record = None
        return self.gamma * weight * kept

    def step(self) -> None:
        """After an optimizer step: measures every few steps, takes the next gamma and alpha. Nothing moves any more
        once `steps` are done."""
        if self.done == self.steps:
            return
        self.sparsity = self.sparsity_soft = None
        state = state_of(self.model)
        if self._passed is not None:
            self.sparsity, self.sparsity_soft = self._measured(*self._passed)
            if self.controller is not None:
                # Near alpha = 1 the step function drops nothing yet while the soft gates already decay: watching it
                # then drives gamma up, and the sparsity overshoots once the gates sharpen.
                watched = self.sparsity if state.alpha >= SHARP_ALPHA else self.sparsity_soft
                self.gamma = self.controller.update(watched, self._progress)
        if self.controller is not None:
            self.goal = self.controller.goal(self._progress)
        state.record = self._passed = None
        self.done += 1
        self._begin()

    def settle(self, input_ids: Iterable[Int64[Tensor, "batch n"]]) -> float:
        """Shift every threshold by one common amount, so that on these rows, a document each, exactly the target is
        dropped; returns the shift. Under torch.distributed every rank takes the one of rank 0's rows. UserError without
        a target, if no shift reaches it, for gates that are sharded (settle the gathered model), and for gates in 16
        bits, too coarse for it.
        """
        if self.target is None:
            raise UserError("the schedule has no sparsity to settle on: give it one")
        batches = [Batch(ids, torch.arange(ids.shape[1]).expand(ids.shape)) for ids in input_ids]
        if not batches:
            raise UserError("there are no rows to settle on: give some batches of training text")
        gates = [wrapper.rule.gate for wrapper in wrappers(self.model)]
        offsets = [gate.beta for gate in gates if gate is not None]
        if any(not beta.numel() for beta in offsets):
            raise UserError("these gates are sharded (ZeRO 3): gather or save the model, load it, and settle that")
        refuse_coarse(offsets)
        failed: UserError | None = None
        try:
            found = calibrate(self.model, batches, self.target)
        except UserError as error:  # of this rank's rows: rank 0's decide, and nobody waits for who is gone
            found, failed = math.nan, error
        shift = torch.tensor(found, device=offsets[0].device)
        if dist.is_initialized():
            for value in (shift, *(beta.data for beta in offsets)):
                dist.broadcast(value, 0)
        if shift.isnan():
            raise failed or UserError("no shift of rank 0's rows reaches the target: see its error")
        return shift.item()

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which `load_state_dict` goes on."""
        controller = None if self.controller is None else asdict(self.controller)
        return {"done": self.done, "gamma": self.gamma, "controller": controller}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a schedule of the same settings stood."""
        self.done, self.gamma = state["done"], state["gamma"]
        if self.controller is not None:
            self.controller = SparsityController(**state["controller"])
        self._begin()

    @property
    def _progress(self) -> float:
        return self.done / self.steps

    def _begin(self) -> None:
        """Before the forward pass of a step. Not within it: activation checkpointing computes it again. After the last
        one gates stay as sharp as they were in it."""
        start, end, share = self._alphas
        state, last = state_of(self.model), self.steps - 1
        state.alpha = alpha_at(min(self.done, last) / self.steps / share, start, end)
        state.record = {} if self.done == last or (self.done < last and self.done % MEASURE_EVERY == 0) else None

    def _measured(self, taken: DropTimes, kept: Tensor) -> tuple[float, float]:
        """Sparsity of the step just taken, (step function, soft gates), over the rows of all ranks."""
        layers, pairs = len(taken.drop_time), visible_pairs(taken.document_end).sum().double()
        counts = torch.stack([taken.kept_pairs().double().sum() / layers, kept.double() * pairs, pairs])
        if dist.is_initialized():
            dist.all_reduce(counts)
        hard, soft = (1.0 - counts[:2] / counts[2].clamp(min=1)).tolist()
        return hard, soft
