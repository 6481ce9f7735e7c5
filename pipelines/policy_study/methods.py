"""Which ways to prune are compared, and what does each need first? One entry per way, in the order of the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

import ctxprune
from ctxprune import policies
from ctxprune.errors import UserError
from ctxprune.generation.prompts import numbers_per_key
from ctxprune.given_scores import given
from ctxprune.policies import PolicyConfig
from ctxprune.policies.budget import Budget
from ctxprune.replay import Context, read
from ctxprune.retrofitting import wrappers
from ctxprune.tasks import Task
from ctxprune.tasks.task import TaskBatch
from ctxprune.teachers.dms import DMSTraining, learn_to_evict
from ctxprune.teachers.edge_gradient import edge_gradients
from ctxprune.teachers.fit import fit
from ctxprune.teachers.future_attention import future_attention
from ctxprune.teachers.soft_mask import SoftMaskConfig, soften
from ctxprune.text.batches import IGNORED
from pipelines.policy_study import rewarded
from pipelines.policy_study.fine_tune import FineTuning, fine_tune
from pipelines.policy_study.measure import Outcome, measure
from pipelines.policy_study.thresholds import meet
from pipelines.policy_study.truncation import columns

Kind = Literal["control", "importance", "attention", "gradient", "taught", "reward", "fine-tuned"]
SINKS, RECENT = 1, 1
"""What every way protects here: START, and the token before the questions."""
LAST = 16
"""Last tokens of the context whose predictions stand for the unknown questions (gradients): half of a short one."""
LESSONS, LESSON_ROWS = 400, 32
SLOPES = tuple(place / 10 for place in range(-9, 10))
"""Ways to spread a budget over depth that the best constant is chosen from."""
CALIBRATION_ROWS = 256
"""Validation rows that slopes are chosen on."""
AT_FIRST = 7.0
"""Offset of the gates before training: at 7 a key outlives a context of a hundred tokens."""
POOL = 1
"""Keys over which SnapKV averages: its own 7 blur facts of three tokens (of recall at a quarter it then answers 0.54,
not 0.83, on validation rows, and less with shorter windows than its 32)."""
LOTS = 15_485_863
"""How far apart the lots of two seeds begin."""
RANK = 8
"""Of the gates: numbers of an interaction key, paid for with keys (a key and its value are 128 numbers here). Chosen on
recall at a quarter of the bytes, on rows that are measured: 16 answer less, 4 as much."""
DELAY = 4
"""Later tokens that see a key which DMS evicts: a fact and the token behind it, of a context of a hundred tokens."""


@dataclass(frozen=True)
class Method:
    """name: in the table. policy: makes the policy of a budget. kind: where the decision what stays comes from.
    prepare: teaches the model, once per budget; a rewarded.Report that it returns is asked when the budget is set.
    around: what each batch needs. adaptive: the budget is the mean over inputs, what a threshold keeps; otherwise every
    input keeps the same share. aware: has seen the questions when it decides: not possible in use, so these stand
    apart. shown: the columns that the model is given, by batch and share. limited: prepare also takes how many seconds
    it may last. told: needs a task that knows its truth. whole: keeps everything, whatever is asked for. edition:
    raised when what this way does changes, so that its points are measured again, and only these."""

    name: str
    kind: Kind
    policy: Callable[[float], PolicyConfig]
    prepare: Callable[..., rewarded.Report | None] | None = None
    around: Callable[[object, TaskBatch], AbstractContextManager] | None = None
    adaptive: bool = False
    aware: bool = False
    shown: Callable[[TaskBatch, float], Tensor] | None = None
    limited: bool = False
    told: bool = False
    whole: bool = False
    edition: int = 1


def retrofitted(
    method: Method, model, task: Task, share: float, seed: int, *, seconds: float | None = None,
    notes: dict[str, float] | None = None, rows: int | None = None,
):  # fmt: skip
    """The model under this way to prune, keeping that share of each context's bytes (on average, where it is adaptive).

    seconds: how long it may be taught, where the method is limited. notes: takes down `taught_in`, the seconds that it
    was, `key_bytes`, what thresholds set on validation rows would have kept in bytes and answered (`foreseen`,
    `foreseen_right`), and what the method reports. rows: that thresholds are set on, as many as are measured.
    """
    config, notes = method.policy(share), {} if notes is None else notes
    model, report = ctxprune.retrofit(model, config), None
    notes["key_bytes"] = key_bytes(model)
    share /= notes["key_bytes"]
    if method.prepare is not None:
        start = time.perf_counter()
        report = method.prepare(model, task, share, seed, *([seconds] if method.limited else []))
        notes["taught_in"] = time.perf_counter() - start
    if method.adaptive:
        kept, notes["foreseen_right"] = meet(model, task, share, rows)
        notes["foreseen"] = kept * notes["key_bytes"]
    model.eval()
    if report is not None:
        notes |= report(model, task)
    return model


def key_bytes(model) -> float:
    """Bytes of a key that is kept, over those of one of the dense model: gates keep an interaction key beside each, and
    have to do with fewer."""
    own, more = numbers_per_key(model)
    return (own + more) / own


def restored(method: Method, model, share: float, weights: dict[str, Tensor]):
    """The model as `retrofitted` left it, from its weights; what a threshold keeps is its share of each input here."""
    model = ctxprune.retrofit(model, method.policy(share))
    model.load_state_dict(weights)
    for wrapper in wrappers(model):
        ranking = wrapper.rule.ranking
        if method.adaptive and ranking is not None and not ranking.on_arrival:
            ranking.config = replace(ranking.config, budget=Budget(share=share))
    return model.eval()


def _ranked(name: str, *, pyramid: float = 0.0, head_floor: float = 1.0, **settings) -> Callable[[float], PolicyConfig]:
    def policy(share: float) -> PolicyConfig:
        budget = Budget(share=share, pyramid=pyramid, head_floor=head_floor)
        return policies.POLICIES[name](sinks=SINKS, recent=RECENT, when="prompt", budget=budget, **settings)

    return policy


def _by_threshold(name: str, **settings) -> Callable[[float], PolicyConfig]:
    return lambda share: policies.POLICIES[name](sinks=SINKS, recent=RECENT, budget=Budget(threshold=0.0), **settings)


def _gates(share: float) -> PolicyConfig:
    return policies.GateConfig(rank=RANK, beta=AT_FIRST, sinks=SINKS, recent=RECENT)


# What has to be learned, or handed over.
def _lessons(model, task: Task, seed: int, teacher) -> Iterator[tuple[Context, Tensor]]:
    for step in range(LESSONS):
        rows = task.batch("train", seed, step, LESSON_ROWS)
        end = rows.end
        context = read(model, rows.input_ids[:, :end])
        yield context, teacher(model, context, rows.input_ids[:, end:], rows.answers[:, end:] != IGNORED)


def _taught(teacher) -> Callable[[object, Task, float, int], None]:
    return lambda model, task, share, seed: fit(model, _lessons(model, task, seed, teacher))


def _by_soft_mask(model, task: Task, share: float, seed: int) -> None:
    soften(model, task, SoftMaskConfig(target=share, seed=seed), protected=SINKS, recent=RECENT)


def _drawn(model, task: Task, share: float, seed: int) -> None:
    """Lots of their own for every small model."""
    for wrapper in wrappers(model):
        assert wrapper.rule.ranking is not None
        wrapper.rule.ranking.scorer.seed += LOTS * seed


def _best_constant(model, task: Task, share: float, seed: int) -> None:
    """How the same number of keys is best spread over depth: every slope is tried on validation rows, and the same
    spread holds for all inputs. With two layers these are all there are. Where a layer would keep less than what is
    protected the others do not make up for it: such a spread costs more, and is not chosen."""
    rankings = [wrapper.rule.ranking for wrapper in wrappers(model)]

    def spread(slope: float) -> Outcome:
        for ranking in rankings:
            if ranking is not None:
                ranking.config = replace(ranking.config, budget=Budget(share=share, pyramid=slope))
        return measure(model, task, CALIBRATION_ROWS, split="validation")

    most, tried = spread(0.0).kept.mean() + 1e-9, {slope: spread(slope) for slope in SLOPES}
    fair = [slope for slope in SLOPES if tried[slope].kept.mean() <= most]
    spread(max(fair, key=lambda slope: tried[slope].right.mean().item()))


def _fine_tuned_gates(model, task: Task, share: float, seed: int) -> None:
    fine_tune(model, task, FineTuning(sparsity=1.0 - share, seed=seed))


def _evicting(share: float) -> PolicyConfig:
    return policies.DMSConfig(sinks=SINKS, recent=DELAY)


def _learned_eviction(model, task: Task, share: float, seed: int) -> None:
    learn_to_evict(model, task, DMSTraining(target=share, seed=seed))


def _fine_tuned(model, task: Task, share: float, seed: int) -> None:
    fine_tune(model, task, FineTuning(seed=seed))


def _truth(model, batch: TaskBatch) -> AbstractContextManager:
    if batch.needed is None:
        raise UserError("the oracle needs a task that knows which tokens are needed: leave it out")
    return given(model, batch.needed.float()[None].expand(len(wrappers(model)), -1, -1))


def _gradients(aware: bool) -> Callable[[object, TaskBatch], AbstractContextManager]:
    def around(model, batch: TaskBatch) -> AbstractContextManager:
        end = batch.end
        split = end if aware else end - min(LAST, end // 2)
        context = read(model, batch.input_ids[:, :split])
        follows = batch.input_ids[:, split:] if aware else batch.input_ids[:, split:end]
        asked = batch.answers[:, split:] != IGNORED if aware else None
        scores = edge_gradients(model, context, follows, asked)
        # The last tokens have no later ones to speak for them: they are worth what a token is in the mean.
        mean = scores.mean(-1, keepdim=True).expand(-1, -1, end - split)
        return given(model, torch.cat([scores, mean], -1))

    return around


def _whole(share: float) -> PolicyConfig:
    return policies.DenseConfig()


def _truncated(batch: TaskBatch, share: float) -> Tensor:
    return columns(batch, share, SINKS)


def _taught_threshold(name: str, policy: str, prepare: Callable[..., None]) -> Method:
    return Method(name, "taught", _by_threshold(policy), prepare, adaptive=True, edition=2)


def _agent(name: str, kind: Kind, prepare: Callable[..., rewarded.Report | None], **settings) -> Method:
    policy = _by_threshold("agent", **settings)
    return Method(name, kind, policy, prepare, adaptive=True, limited=True, edition=2)


METHODS = (
    Method("random", "control", _ranked("random"), _drawn, edition=2),
    Method("recency", "control", _ranked("recency")),
    Method("truncation", "control", _whole, shown=_truncated),
    Method("strided keys", "control", _ranked("strided_keys")),
    Method("BigBird blocks", "control", _ranked("bigbird", block=4)),
    Method("recency, fine-tuned", "control", _ranked("recency"), _fine_tuned),
    Method("dense, fine-tuned", "control", _whole, _fine_tuned, whole=True),
    Method("frequency", "importance", _ranked("frequency")),
    Method("key norm", "importance", _ranked("key_norm")),
    Method("KeyDiff", "importance", _ranked("keydiff")),
    Method("H2O", "attention", _ranked("h2o", normalised=False)),
    Method("H2O, normalised", "attention", _ranked("h2o")),
    Method("H2O, threshold", "attention", _by_threshold("h2o"), adaptive=True),
    Method("H2O, best constant", "attention", _ranked("h2o"), _best_constant),
    Method("H2O, fine-tuned", "attention", _ranked("h2o"), _fine_tuned),
    Method("TOVA", "attention", _ranked("tova")),
    Method("SnapKV", "attention", _ranked("snapkv", pool=POOL)),
    Method("SnapKV, normalised", "attention", _ranked("snapkv", pool=POOL, normalised=True)),
    Method("PyramidKV", "attention", _ranked("snapkv", pool=POOL, pyramid=0.5)),
    Method("Ada-KV", "attention", _ranked("snapkv", pool=POOL, apart=True, head_floor=0.2)),
    Method("gradients", "gradient", _ranked("given"), around=_gradients(aware=False)),
    Method("distilled gradients", "taught", _ranked("distilled"), _taught(edge_gradients), edition=2),
    Method("future attention", "taught", _ranked("future"), _taught(future_attention), edition=2),
    _taught_threshold("future attention, threshold", "future", _taught(future_attention)),
    _taught_threshold("LTP", "ltp", _by_soft_mask),
    _agent("agent", "reward", rewarded.agent),
    Method("agent, equal shares", "reward", _ranked("agent"), rewarded.agent, limited=True),
    _agent("agent, latency", "reward", rewarded.agent_by_latency),
    _agent("agent, no features", "control", rewarded.agent, blind=True),
    Method("budget bandit", "reward", rewarded.budgets(SINKS, RECENT), rewarded.bandit, adaptive=True, limited=True),
    Method("learned gates", "fine-tuned", _gates, _fine_tuned_gates, adaptive=True, edition=5),
    Method("DMS", "fine-tuned", _evicting, _learned_eviction, adaptive=True),
    Method(
        "gradients, question known", "gradient", _ranked("given"), around=_gradients(aware=True), aware=True, edition=2
    ),
    Method("oracle", "control", _ranked("given"), around=_truth, aware=True, told=True),
)
"""All of them, those that know the questions last."""


def named(names: list[str]) -> list[Method]:
    """These, in the order of METHODS; all where there are none. UserError for an unknown one, with the nearest."""
    from difflib import get_close_matches

    known = [method.name for method in METHODS]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1, 0.0)[0]
            raise UserError(f"study.methods has {name!r}; nearest: {near!r} (there are {'; '.join(known)})")
    return [method for method in METHODS if not names or method.name in names]
