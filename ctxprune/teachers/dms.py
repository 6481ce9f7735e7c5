"""How do heads learn what to evict while the model learns to live with it? Dynamic memory sparsification (DMS, arXiv
2506.05345, section 3.2).

A decision is relaxed to a Gumbel-sigmoid: alpha in (0, 1) for each token and KV head, and keys older than the delay
have log(1 - alpha) added to their logits: what is evicted weighs nothing before the softmax, as when it is gone. The
mean of what is kept may not exceed a share that falls linearly from everything to the target; below it nothing pushes
(one-sided). The model is to say what it said when it was dense. The share is that of the context's keys when the
questions begin, where the paper counts all tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from ctxprune.errors import UserError
from ctxprune.objective import distillation_loss, next_token_loss
from ctxprune.policies.dms import DMSScorer
from ctxprune.policies.rule import Ranking
from ctxprune.precision import refuse_coarse
from ctxprune.retrofitting import gate_parameters, mode, state_of, wrappers
from ctxprune.tasks.scoring import in_context
from ctxprune.tasks.task import Task, TaskBatch
from ctxprune.teachers.lessons import lesson
from ctxprune.visibility import ends, layout

_WARM_UP, _DECAY = 30, 0.3  # steps; share of them


@dataclass(frozen=True)
class DMSTraining:
    """How heads and model learn."""

    target: float = 0.25
    """Share of the context's keys that is kept when the questions begin, in (0, 1); the delay's own are among them."""
    price: float = 10.0
    """Nats per share that is kept above what the schedule allows."""
    annealed: float = 0.7
    """Share of the steps over which that falls from 1 to the target, in (0, 1]."""
    temperature: float = 0.3
    """Of the Gumbel-sigmoid."""
    distillation: float = 1.0
    """Part of the loss that is the distance to the dense model's answers, in [0, 1] (1 as published); the rest is the
    loss of the true ones."""
    rows: int = 32
    """Inputs per step."""
    steps: int = 800
    """Steps of AdamW."""
    learning_rate: float = 2e-4
    """Of the model's own weights; 0: they stay as they are."""
    scorer_learning_rate: float = 1e-2
    """Of the heads' decisions."""
    seed: int = 0
    """Of the noise and of the rows that are read."""

    def __post_init__(self):
        if not 0.0 < self.target < 1.0:
            raise UserError(f"target is {self.target}: give a share in (0, 1)")
        if not 0.0 < self.annealed <= 1.0:
            raise UserError(f"annealed is {self.annealed}: give a share above 0 and at most 1")
        if not 0.0 <= self.distillation <= 1.0:
            raise UserError(f"distillation is {self.distillation}: give a part from 0 to 1")
        for name in ("price", "temperature", "scorer_learning_rate"):
            if not getattr(self, name) > 0.0:
                raise UserError(f"{name} is {getattr(self, name)}: give a number above 0")
        if not self.learning_rate >= 0.0:
            raise UserError(f"learning_rate is {self.learning_rate}: give 0 or more")
        for name in ("rows", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")

    def allowed(self, progress: float) -> float:
        """Share that costs nothing after this share of the steps."""
        return 1.0 - (1.0 - self.target) * min(1.0, progress / self.annealed)


@dataclass
class Delayed:
    """One layer's call while heads learn.

    left: log(1 - alpha) of each key in each head that decides; end: first row that no longer sees each key by its
    document and position; delay: later queries that see every key in full.
    """

    left: Float[Tensor, "batch heads n"]
    end: Int[Tensor, "batch n"]
    delay: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query (batch, heads, n, width), key, value (batch, kv_heads, n, width) -> (batch, heads, n, width). Takes
        memory for (batch, heads, n, n) numbers."""
        column = torch.arange(query.shape[2], device=query.device)
        age = column[:, None] - column
        seen = (age >= 0) & (column[:, None] < self.end[:, None])
        bias = torch.where(age > self.delay, self.left[:, :, None], 0.0).masked_fill(~seen[:, None], -torch.inf)
        bias = bias.repeat_interleave(query.shape[1] // bias.shape[1], 1).to(query.dtype)
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=True)


def learn_to_evict(
    model, task: Task, how: DMSTraining, progress: Callable[[int, float, float], None] | None = None
) -> None:
    """Train a model whose policy is `dms`, and its heads' decisions, on the task's answers. progress(step, loss of the
    answers in nats, share of the context kept)."""
    rankings(model)
    decisions = gate_parameters(model)
    refuse_coarse(model.parameters() if how.learning_rate else decisions)
    known = {id(p) for p in decisions}
    own = [p for p in model.parameters() if id(p) not in known] if how.learning_rate else []
    groups = [
        {"params": decisions, "peak": how.scorer_learning_rate},
        {"params": own, "peak": how.learning_rate},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, weight_decay=0.0)
    dense = copy.deepcopy(model).eval() if own else model
    noise = torch.Generator().manual_seed(how.seed)
    model.train()
    for step in range(how.steps):
        done = step / how.steps
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / _WARM_UP, (1.0 - done) / _DECAY)
        rows = lesson(model, task, how.seed, step, how.rows)
        with torch.enable_grad():
            said, kept = relaxed(model, rows, how.temperature, noise)
            lost = (1.0 - how.distillation) * next_token_loss(said, rows.answers)
            if how.distillation:
                with torch.no_grad(), mode(dense, "dense"):
                    wanted = dense(rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
                lost = lost + how.distillation * distillation_loss(said, wanted, rows.answers)
            optimizer.zero_grad()
            (lost + how.price * (kept - how.allowed(done)).clamp(min=0)).backward()
        torch.nn.utils.clip_grad_norm_([*decisions, *own], 1.0)
        optimizer.step()
        if progress is not None:
            progress(step + 1, lost.item(), kept.item())
    model.zero_grad()
    model.eval()


def relaxed(
    model, rows: TaskBatch, temperature: float, noise: torch.Generator | None
) -> tuple[Float[Tensor, "batch n vocab"], Float[Tensor, ""]]:
    """Logits of one pass under relaxed decisions, and the mean share of the contexts' keys that the first query behind
    them sees. noise: None for none. Differentiable in the decisions and the model."""
    state, layers, taught = state_of(model), wrappers(model), rankings(model)
    ids, padding = rows.input_ids, rows.attention_mask
    plan = layout(ids.shape, None, None if padding is None else padding.bool(), ids.device)
    inside = in_context(rows)
    late = torch.arange(ids.shape[1], device=ids.device) >= rows.context_end[:, None] - state.policy.recent
    shares: dict[int, Tensor] = {}

    def call(layer: int, hidden: Tensor) -> Delayed:
        score = taught[layer].scorer(hidden)
        if noise is not None:
            lot = torch.rand(score.shape, generator=noise).clamp(1e-6, 1 - 1e-6).to(score)
            score = score + (lot / (1 - lot)).log()  # logistic: the difference of two Gumbels
        protected = plan.position < state.policy.sinks
        left = logsigmoid(score / temperature).masked_fill(protected[:, None], 0.0)
        kept = left.exp().masked_fill(late[:, None], 1.0).mean(1)
        shares[layer] = (kept * inside).sum() / inside.sum()
        return Delayed(left, ends(plan, layers[layer].lifetime(plan.position)), state.policy.recent)

    state.replay = call
    try:
        logits = model(ids, attention_mask=padding, use_cache=False).logits
    finally:
        state.replay = None
    return logits, torch.stack(list(shares.values())).mean()


def rankings(model) -> list[Ranking]:
    """Each layer's, of a model whose heads decide when a key comes; UserError for another."""
    found = [wrapper.rule.ranking for wrapper in wrappers(model)]
    right = [one for one in found if one is not None and isinstance(one.scorer, DMSScorer) and one.on_arrival]
    if not right or len(right) < len(found):
        raise UserError("this teaches delayed eviction: retrofit the model with DMSConfig() as it is, when=step")
    return right
