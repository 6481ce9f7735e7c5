"""What does each way to prune cost and save in time? Reading contexts and answering over the cache, in turn, alone on
the machine, deciding included."""

from __future__ import annotations

import math
import statistics
import time
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import ctxprune
from ctxprune import PrunedCache, tasks
from ctxprune.policies import DenseConfig
from ctxprune.ranked_calls import Decisions
from ctxprune.retrofitting import state_of, wrappers
from ctxprune.tasks.task import TaskBatch
from pipelines import store
from pipelines.policy_study import jobs, texts
from pipelines.policy_study.config import StudyConfig
from pipelines.policy_study.methods import Method, restored
from pipelines.policy_study.truncation import cut
from pipelines.progress import Bars

ROWS = 16
"""Sequences that are answered together."""
LENGTHS, LONG_ROWS, LONG_TURNS = (256, 1024, 2048), 4, 3
"""Longer contexts, in tokens; how many are read together; how often each is timed."""
Key = tuple[str, str, float]
Subjects = dict[str, tuple[torch.nn.Module, Method | None]]


def timed(
    study: StudyConfig, kept: dict[str, str | None], methods: list[Method], root: Path, bars: Bars
) -> dict[Key, dict[str, float | None]]:
    """By (task, method, share), on the first seed's model: ms to read the contexts and ms per later token, each of
    ROWS sequences together and as a multiple of dense in the same round; ms of these that went into deciding. At the
    smallest share what `longer` says too. kept: each task's rows, see texts."""
    found: dict[Key, dict[str, float | None]] = {}
    done = 0
    with bars.task("timing (methods)", len(study.tasks) * len(methods) * (len(study.shares) + 1)) as advance:
        for name in study.tasks:
            inputs = jobs.model_inputs(name, study.steps, study.seeds[0], kept[name])
            if not store.finished(store.folder_of(root, "study-model", inputs)):
                continue  # it failed, and was said to
            rows = texts.restored(root, inputs["task"]).batch("test", 1, 0, ROWS)
            for share in sorted(study.shares, reverse=True):
                subjects = _subjects(study, methods, root, inputs, share)
                rounds = _rounds(subjects, rows, share, study.repeats)
                dense = rounds.pop("dense")
                found |= {
                    (name, label, share): _beside(one, dense, subjects[label][0]) for label, one in rounds.items()
                }
                done += len(rounds)
                advance(done)
            for label, more in longer(subjects, name, share, rows.end).items():
                found[name, label, share] |= more
            done += len(rounds)
            advance(done)
    return found


def longer(subjects: Subjects, name: str, share: float, own: int) -> dict[str, dict[str, float | None]]:
    """By method, over contexts of the task's own length and the longer LENGTHS. even_from: the length in tokens from
    which on a later token takes no longer than dense; None: not even at the longest. repaid: later tokens after which
    reading the longest and writing these takes no longer than dense, deciding included; None: there is no such
    number. Nothing of a task whose contexts cannot be longer."""
    if "length" not in {field.name for field in fields(tasks.TASKS[name])}:
        return {}
    lengths = [own, *(length for length in LENGTHS if length > own)]
    slower: dict[str, list[bool]] = {label: [] for label in subjects if label != "dense"}
    after: dict[str, float | None] = {}
    for length in lengths:
        rows = tasks.from_dict({"task": name, "length": length}).batch("test", 1, 0, LONG_ROWS)
        rounds = _rounds(subjects, rows, share, LONG_TURNS)
        dense = rounds.pop("dense")
        for label, one in rounds.items():
            slower[label].append(one["token_ms"] > dense["token_ms"])
            after[label] = repaid(one["read_ms"] - dense["read_ms"], dense["token_ms"] - one["token_ms"])
    return {label: {"even_from": since(lengths, was), "repaid": after[label]} for label, was in slower.items()}


def repaid(lost: float, won: float) -> float | None:
    """Tokens that win back, at `won` ms each, what reading lost in ms; None where each loses more."""
    if lost <= 0:
        return 0.0 if won >= 0 else None
    return float(math.ceil(lost / won)) if won > 0 else None


def since(lengths: list[int], slower: list[bool]) -> float | None:
    """The first length from which on nothing was slower; None where the longest was."""
    last = max((place for place, was in enumerate(slower) if was), default=-1)
    return None if last == len(lengths) - 1 else float(lengths[last + 1])


def _subjects(study: StudyConfig, methods: list[Method], root: Path, inputs: dict, share: float) -> Subjects:
    """The first seed's models, dense first: of each method the one that was measured. inputs: of the small model."""
    subjects: Subjects = {"dense": (ctxprune.retrofit(jobs.small(root, inputs), DenseConfig()), None)}
    for method in methods:
        point = store.folder_of(root, "study-point", jobs.point_of(root, study, inputs, method.name, share))
        if store.finished(point):
            weights = load_file(point / "weights.safetensors")
            subjects[method.name] = (restored(method, jobs.small(root, inputs), share, weights), method)
    return subjects


def _rounds(subjects: Subjects, rows: TaskBatch, share: float, turns: int) -> dict[str, dict[str, float]]:
    """Medians of so many turns, all methods in each."""
    runs: dict[str, list[dict[str, float]]] = {label: [] for label in subjects}
    for turn in range(turns + 1):  # the first is a warm-up
        for label, (model, method) in subjects.items():
            shown = method.shown if method else None
            one = _once(model, cut(rows, shown(rows, share)) if shown else rows, method.around if method else None)
            if turn:
                runs[label].append(one)
    return {
        label: {key: statistics.median(one[key] for one in several) for key in several[0]}
        for label, several in runs.items()
    }


def _beside(one: dict[str, float], dense: dict[str, float], model: torch.nn.Module) -> dict[str, float | None]:
    """What the table says of a method. What gates decide is part of their attention: nobody can time it alone."""
    gated = any(wrapper.rule.gate is not None for wrapper in wrappers(model))
    return {
        "read_ms": one["read_ms"],
        "token_ms": one["token_ms"],
        "deciding_ms": None if gated else one["deciding_ms"],
        "read_of_dense": one["read_ms"] / dense["read_ms"],
        "token_of_dense": one["token_ms"] / dense["token_ms"],
    }


@torch.no_grad()  # not inference mode: what is read there cannot be differentiated
def _once(model, rows: TaskBatch, around) -> dict[str, float]:
    end, ids = rows.end, rows.input_ids
    held, state = PrunedCache(page=16), state_of(model)
    held.prompt = torch.full((len(ids),), end)
    state.decisions = Decisions()
    start = time.perf_counter()
    scored = around(model, rows) if around else nullcontext()
    before = time.perf_counter() - start
    with scored:
        _feed(model, ids[:, :end], held)
    read = time.perf_counter() - start
    start = time.perf_counter()
    for column in range(end, ids.shape[1]):
        _feed(model, ids[:, column : column + 1], held)
    later = time.perf_counter() - start
    deciding, state.decisions = before + state.decisions.seconds, None
    steps = max(1, ids.shape[1] - end)
    return {"read_ms": 1e3 * read, "token_ms": 1e3 * later / steps, "deciding_ms": 1e3 * deciding}


def _feed(model, ids: Tensor, held: PrunedCache) -> None:
    model(ids, past_key_values=held, use_cache=True, logits_to_keep=1)
