"""Does it matter how tokens reach the cache? Rows of any lengths, fed in pieces of any size with padding at either
side, permuted, joined by others and leaving, against one pass over each row alone: same logits, same kept sets.

CTXPRUNE_CASES sets how many random cases are tried (400 by default).
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import cache

import pytest
import torch

import ctxprune
from ctxprune import PrunedCache
from ctxprune.drop_time import forward_with_drop_times
from tests.models import LAYERS, gated, small_model, tokens

CASES = int(os.environ.get("CTXPRUNE_CASES", "400"))
AT_ONCE = 20

MODELS: dict[str, Callable] = {
    "llama": lambda: gated("llama"),
    "gpt2": lambda: gated("gpt2"),
    "protected": lambda: gated("llama", sinks=2, recent=3),
    "in depth": lambda: gated("llama", propagate_in_depth=True),
    "sliding": lambda: gated("mistral-sliding"),
    "window": lambda: ctxprune.retrofit(small_model("llama"), ctxprune.WindowConfig(widths=(3, 9, 17), sinks=1)),
    "strided": lambda: ctxprune.retrofit(small_model("gpt2"), ctxprune.StridedConfig((4, 5, 7), (1, 2, 1))),
    "dense": lambda: ctxprune.retrofit(small_model("llama"), ctxprune.DenseConfig()),
}


@cache
def model_of(name: str):
    return MODELS[name]().double()


class Row:
    """A text, what one pass says of it, and how much of it has been fed."""

    def __init__(self, model, length: int, seed: int):
        self.ids = tokens(1, length, seed=seed)[0]
        self.taken, logits = forward_with_drop_times(model, self.ids[None])
        self.logits, self.fed = logits[0], 0

    def kept(self, layer: int) -> list[int]:
        """Positions that outlive all that has been fed."""
        times = self.taken.drop_time[layer, 0]
        return [j for j in range(self.fed) if times[j] >= self.fed]


@torch.no_grad()
def feed(model, held: PrunedCache, rows: list[Row], counts: list[int], left: bool) -> float:
    """That many more tokens of each row in one call; the largest difference of a logit."""
    n = max(counts)
    ids, mask, position = torch.zeros(3, len(rows), n, dtype=torch.long)
    places = []
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        place = slice(n - count, n) if left else slice(0, count)
        ids[index, place] = row.ids[row.fed : row.fed + count]
        mask[index, place], position[index, place] = 1, torch.arange(row.fed, row.fed + count)
        places.append(place)
    inputs = {} if min(counts) == n else {"attention_mask": mask}
    logits = model(ids, position_ids=position, past_key_values=held, use_cache=True, **inputs).logits
    worst = 0.0
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        if count:
            error = (logits[index, places[index]] - row.logits[row.fed : row.fed + count]).abs().max().item()
            worst = max(worst, error if error == error else float("inf"))
        row.fed += count
    return worst


def disagreement(seed: int) -> tuple[str, int, float]:
    """A random model, random rows and a random way through them: (model, kept sets that differ, worst logit)."""
    choose = random.Random(seed)
    name = choose.choice(list(MODELS))
    model, wrong, worst = model_of(name), 0, 0.0
    settings = {"page": 16, "reversible": choose.random() < 0.2}
    held, rows = PrunedCache(**settings), []
    waiting = [Row(model, choose.randint(1, 60), seed=10 * seed + i) for i in range(choose.randint(1, 5))]
    while waiting or rows:
        if waiting and (not rows or choose.random() < 0.3):
            new = [waiting.pop() for _ in range(choose.randint(1, len(waiting)))]
            own = PrunedCache(**settings)
            piece = choose.choice([1, 5, 60])
            counts = [min(len(row.ids), choose.randint(1, piece)) for row in new]
            worst = max(worst, feed(model, own, new, counts, left=choose.random() < 0.5))
            held.absorb(own)
            rows += new
        else:
            most = choose.choice([1, 1, 1, 3, 20])
            counts = [min(len(row.ids) - row.fed, choose.randint(0 if most > 1 else 1, most)) for row in rows]
            if max(counts) > 0:
                worst = max(worst, feed(model, held, rows, counts, left=choose.random() < 0.5))
        for layer, positions in enumerate(held.positions()):
            wrong += sum(found != row.kept(layer) for found, row in zip(positions, rows, strict=True))
        if choose.random() < 0.2:
            held.shrink(0.0)
        order = [index for index, row in enumerate(rows) if row.fed < len(row.ids)]
        if len(order) < len(rows) or choose.random() < 0.2:
            choose.shuffle(order)
            rows = [rows[index] for index in order]
            if rows:
                held.select(torch.tensor(order))
            else:
                held = PrunedCache(**settings)
    return name, wrong, worst


@pytest.mark.parametrize("first", range(0, CASES, AT_ONCE))
def test_every_way_through_is_one_pass(first):
    for seed in range(first, min(CASES, first + AT_ONCE)):
        name, wrong, worst = disagreement(seed)
        assert wrong == 0 and worst < 1e-10, (seed, name, wrong, worst)


def test_the_cases_reach_every_model():
    assert {random.Random(seed).choice(list(MODELS)) for seed in range(CASES)} == set(MODELS)
    assert model_of("llama").config.num_hidden_layers == LAYERS


BUGS = {
    "the number of survivors for the position": (
        "ctxprune.decoding._positions",
        lambda original: (
            lambda cache, batch, n, given, real, device: (
                original(cache, batch, n, given, real, device) * 0
                + torch.arange(n)
                + (0 if cache.length is None else int(cache.live_tokens().max()))
            )
        ),
    ),
    "slots of living keys are taken": (
        "ctxprune.cache.layer_cache.LayerCache._alive",
        lambda original: lambda layer, rows, step: original(layer, rows, step) & False,
    ),
    "a joined row keeps the pages' old numbers": (
        "ctxprune.cache.layer_cache.LayerCache.absorb",
        lambda original: (
            lambda layer, other: (setattr(other.pages, "table", other.pages.table * 0), original(layer, other))
        ),
    ),
    "rows are permuted without their pages": (
        "ctxprune.cache.layer_cache.LayerCache.select",
        lambda original: lambda layer, rows: original(layer, rows.sort().values),
    ),
    "padding is stored": (
        "ctxprune.decoding._last_end",
        lambda original: lambda plan, real: plan.end[:, -1:] * 0,
    ),
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS.keys())
def test_twin_a_planted_bug_is_caught(bug, monkeypatch):
    target, plant = bug
    module, name = target.rsplit(".", 1)
    owner = module.rsplit(".", 1)
    place = getattr(__import__(owner[0], fromlist=[owner[1]]), owner[1])
    monkeypatch.setattr(place, name, plant(getattr(place, name)))
    for seed in range(60):
        try:
            _, wrong, worst = disagreement(seed)
        except (IndexError, RuntimeError, ValueError):
            return
        if wrong or worst > 1e-10:
            return
    pytest.fail("not caught")
