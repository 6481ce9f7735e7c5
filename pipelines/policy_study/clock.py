"""What does each way to prune cost and save in time? Reading contexts and answering over the cache, in turn, alone on
the machine, deciding included."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import ctxprune
from ctxprune import PrunedCache, tasks
from ctxprune.policies import DenseConfig
from ctxprune.ranked_calls import Decisions
from ctxprune.retrofitting import state_of
from ctxprune.tasks.task import TaskBatch
from pipelines import store
from pipelines.policy_study import jobs
from pipelines.policy_study.config import StudyConfig
from pipelines.policy_study.methods import Method, restored
from pipelines.policy_study.truncation import cut
from pipelines.progress import Bars

ROWS = 16
"""Sequences that are answered together."""
Key = tuple[str, str, float]


def timed(study: StudyConfig, methods: list[Method], root: Path, bars: Bars) -> dict[Key, dict[str, float]]:
    """By (task, method, share), on the first seed's model: ms to read the contexts and ms per later token, each of
    ROWS sequences together and as a multiple of dense in the same round; ms of these that went into deciding; live
    cache bytes over those of dense."""
    found: dict[Key, dict[str, float]] = {}
    with bars.task("timing (methods)", len(study.tasks) * len(methods) * len(study.shares)) as advance:
        for task in study.tasks:
            for share in study.shares:
                found |= _of_share(study, methods, root, task, share)
                advance(len(found))
    return found


def _of_share(study: StudyConfig, methods: list[Method], root: Path, name: str, share: float) -> dict:
    task, inputs = tasks.from_dict({"task": name}), jobs.model_inputs(name, study.steps, study.seeds[0])
    rows = task.batch("test", 1, 0, ROWS)
    dense = ctxprune.retrofit(jobs.small(root, inputs), DenseConfig())
    subjects = {"dense": (dense, None, rows)}
    for method in methods:
        point = store.folder_of(root, "study-point", jobs.point_inputs(inputs, method.name, share, study.rows))
        if store.finished(point):
            weights = load_file(point / "weights.safetensors")
            given = cut(rows, method.shown(rows, share)) if method.shown else rows
            subjects[method.name] = (restored(method, jobs.small(root, inputs), share, weights), method.around, given)
    rounds: dict[str, list[dict[str, float]]] = {label: [] for label in subjects}
    for turn in range(study.repeats + 1):  # the first is a warm-up
        for label, (model, around, given) in subjects.items():
            one = _once(model, given, around)
            if turn:
                rounds[label].append(one)
    beside = {key: statistics.median(one[key] for one in rounds["dense"]) for key in rounds["dense"][0]}
    found = {}
    for label, runs in rounds.items():
        if label == "dense":
            continue
        middle = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        found[(name, label, share)] = {
            "read_ms": middle["read_ms"],
            "token_ms": middle["token_ms"],
            "deciding_ms": middle["deciding_ms"],
            "read_of_dense": middle["read_ms"] / beside["read_ms"],
            "token_of_dense": middle["token_ms"] / beside["token_ms"],
            "bytes_of_dense": middle["bytes"] / beside["bytes"],
        }
    return found


@torch.no_grad()  # not inference mode: what is read there cannot be differentiated
def _once(model, rows: TaskBatch, around) -> dict[str, float]:
    end, ids = rows.end, rows.input_ids
    held, state = PrunedCache(page=16), state_of(model)
    held.prompt = torch.full((len(ids),), end)
    state.decisions = Decisions()
    start = time.perf_counter()
    with around(model, rows) if around else nullcontext():
        _feed(model, ids[:, :end], held)
    read = time.perf_counter() - start
    live = held.live_bytes()
    start = time.perf_counter()
    for column in range(end, ids.shape[1]):
        _feed(model, ids[:, column : column + 1], held)
    later = time.perf_counter() - start
    deciding, state.decisions = state.decisions.seconds, None
    steps = max(1, ids.shape[1] - end)
    return {"read_ms": 1e3 * read, "token_ms": 1e3 * later / steps, "deciding_ms": 1e3 * deciding, "bytes": float(live)}


def _feed(model, ids: Tensor, held: PrunedCache) -> None:
    model(ids, past_key_values=held, use_cache=True, logits_to_keep=1)
