"""What happens in a training step, and in which order over a run? The same loop for base models and trials."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ctxprune import objective
from ctxprune.retrofitting import freeze_backbone, gate_parameters, state_of
from ctxprune.schedule import PruningSchedule
from ctxprune.text.batches import Batch, targets, train_batch
from ctxprune.text.token_store import TokenSplit
from ctxprune.visibility import visible_pairs
from pipelines import engine as engines
from pipelines.config import Config, PruningConfig, TrainConfig


@dataclass
class Plan:
    """One run of the loop: base models and trials differ only here."""

    steps: int
    learning_rate: float
    gate_learning_rate: float
    train: TrainConfig
    pruning: PruningConfig
    gated: bool


def base_plan(config: Config) -> Plan:
    """Plain language modelling from scratch."""
    train = config.train
    return Plan(train.base_steps, train.base_learning_rate, 0.0, train, PruningConfig(policy="dense"), False)


def trial_plan(config: Config) -> Plan:
    """Fine-tuning under the trial's policy."""
    train, gated = config.train, config.pruning.policy == "learned"
    return Plan(train.steps, train.learning_rate, train.gate_learning_rate, train, config.pruning, gated)


def run(
    model: nn.Module, teacher: nn.Module | None, config: Config, plan: Plan, split: TokenSplit, log: Path | None
) -> dict[str, torch.Tensor] | None:
    """Train model over the default process group; rank 0 gets the final weights, the others None.

    teacher: the dense model to distil from, or None. log: metrics.jsonl to append to (rank 0 only).
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if plan.pruning.freeze_backbone:
        freeze_backbone(model)
    wrapped = engines.start(model, _groups(model, plan), config.engine, plan.train, world)
    if teacher is not None:
        teacher.to(wrapped.device)
    schedule = pruning_schedule(model, plan) if plan.gated else None
    wrapped.train()
    start, rows = time.monotonic(), _appender(log)
    for step in range(plan.steps):
        progress = step / plan.steps
        _set_learning_rates(wrapped.optimizer, learning_rate_factor(progress, step, plan))
        batch = train_batch(split, plan.train.seed, step, rank, world, plan.train.batch, plan.train.context)
        loss = train_step(wrapped, model, teacher, batch, schedule, plan, step)
        row = _row(step, loss, plan, time.monotonic() - start)
        if schedule is not None:
            row["alpha"] = state_of(model).alpha
            schedule.step()
            row |= {"gamma": schedule.gamma, "sparsity": schedule.sparsity, "sparsity_soft": schedule.sparsity_soft}
            row["sparsity_goal"] = schedule.goal
        if step % plan.train.log_every == 0 or step + 1 == plan.steps:
            rows(row)
    return engines.full_weights(wrapped, config.engine.zero)


def pruning_schedule(model: nn.Module, plan: Plan) -> PruningSchedule:
    """What steers the gates over this run."""
    pruning = plan.pruning
    alphas = {"alpha_start": pruning.alpha_start, "alpha_end": pruning.alpha_end, "alpha_steps": pruning.alpha_steps}
    return PruningSchedule(model, plan.steps, pruning.sparsity, gamma=pruning.gamma, **alphas)


def train_step(
    wrapped, model: nn.Module, teacher, batch: Batch, schedule: PruningSchedule | None, plan: Plan, step: int
) -> float:
    """One optimizer step: next-token loss + gamma * kept share (+ distillation). Returns the first, nats per token of
    this rank's rows."""
    batch = Batch(batch.input_ids.to(wrapped.device), batch.position_ids.to(wrapped.device))
    wanted = targets(batch)
    logits = wrapped(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    prediction = objective.next_token_loss(logits, wanted)
    token_weight, pair_weight = _weights(wanted, state_of(model, default=None))
    loss = token_weight * prediction
    if schedule is not None:
        loss = loss + schedule.penalty(pair_weight)
    if teacher is not None:
        with torch.no_grad():
            aim = teacher(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        loss = loss + plan.pruning.distillation * token_weight * objective.distillation_loss(logits, aim, wanted)
    _refuse_non_finite(loss, step)
    wrapped.backward(loss)
    wrapped.step()
    return prediction.item()


def _weights(wanted: torch.Tensor, state) -> tuple[float, float]:
    """What this rank's means over predicted tokens and over visible pairs count for in the mean over all ranks' rows.

    Packed documents leave ranks unequal counts; DeepSpeed averages ranks as if they were equal.
    """
    world = dist.get_world_size()
    if world == 1:
        return 1.0, 1.0
    pairs = visible_pairs(state.documents.end).sum() if state is not None else torch.ones((), device=wanted.device)
    own = torch.stack([(wanted != objective.IGNORED).sum().double(), pairs.double()])
    total = own.clone()
    dist.all_reduce(total)
    tokens, pairs = (own * world / total.clamp(min=1)).tolist()
    return tokens, pairs


def learning_rate_factor(progress: float, step: int, plan: Plan) -> float:
    """Linear warm-up, constant, linear decay to 0 over the last share of the steps (none in the paper)."""
    warmup = max(1.0, plan.train.warmup * plan.steps)
    rising = min(1.0, (step + 1) / warmup)
    falling = min(1.0, (1.0 - progress) / plan.train.decay) if plan.train.decay > 0 else 1.0
    return rising * falling


def _groups(model: nn.Module, plan: Plan) -> list[dict]:
    """AdamW groups: the backbone, and the gates with a learning rate of their own; `peak` is what the schedule
    scales."""
    gates = {id(p) for p in gate_parameters(model)}
    groups = []
    for rate, chosen in (
        (plan.learning_rate, [p for p in model.parameters() if id(p) not in gates and p.requires_grad]),
        (plan.gate_learning_rate, [p for p in model.parameters() if id(p) in gates]),
    ):
        if chosen:
            groups.append({"params": chosen, "lr": rate, "peak": rate})
    return groups


def _set_learning_rates(optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def _refuse_non_finite(loss: torch.Tensor, step: int) -> None:
    """Every rank stops before the update if any rank's loss is not finite."""
    fine = torch.isfinite(loss.detach()).to(torch.int32)
    everywhere = fine.clone()
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    if not bool(everywhere):
        whose = "this rank" if not bool(fine) else "another rank"
        raise FloatingPointError(
            f"the loss of step {step} is not finite on {whose} (rank {dist.get_rank()}): lower train.learning_rate"
        )


def _row(step: int, loss: float, plan: Plan, seconds: float) -> dict:
    tokens = (step + 1) * plan.train.batch * plan.train.context
    row = {"kind": "train", "step": step, "steps": plan.steps, "loss": loss, "seconds": round(seconds, 3)}
    row["tokens_per_second"] = round(tokens / max(seconds, 1e-9), 1)
    row["learning_rate"] = plan.learning_rate * learning_rate_factor(step / plan.steps, step, plan)
    return row


def _appender(log: Path | None) -> Callable[[dict], None]:
    """Append one row per call to metrics.jsonl, flushed at once so that it can be watched; nothing where log is
    None."""
    if log is None:
        return lambda row: None

    def append(row: dict) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with log.open("a") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")
            file.flush()

    return append
