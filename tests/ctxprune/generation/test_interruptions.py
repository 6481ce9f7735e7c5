"""Whatever is raised in the middle of a step: is every text what it would have been, and who is told of it?"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from ctxprune import UserError, generate
from ctxprune.cache.pruned_cache import PrunedCache
from ctxprune.generation import batching
from ctxprune.generation.batching import Batcher
from ctxprune.generation.prompts import page_bytes
from ctxprune.generation.sampling import Sampling
from tests.models import LAYERS, gated, tokens

PROMPTS = [tokens(1, n, seed=n)[0] for n in (20, 18, 33)]
SAMPLED = Sampling(temperature=1.0, seed=3)


class Gone(Exception):
    """Who listened has left."""


def undisturbed(model, how: Sampling | None = None) -> list[list[int]]:
    batcher = Batcher(model, page=16)
    requests = [batcher.submit(prompt, max_new_tokens=12, sampling=how) for prompt in PROMPTS]
    batcher.run()
    return [one.tokens for one in requests]


def to_the_end(batcher: Batcher, error: type[BaseException]) -> tuple[list, int]:
    """Steps, whatever they raise: all that ended, and how often something was raised."""
    ended, raised = [], 0
    while batcher.waiting or batcher.running or batcher.ended:
        try:
            ended += batcher.step()
        except error:
            raised += 1
    return ended, raised


@pytest.mark.parametrize("how", [None, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("at", [1, 5, 12], ids=["first token", "in the middle", "last token"])
def test_a_listener_that_raises_costs_nobody_a_token(how, at, monkeypatch):
    model, told, reads, read = gated().double(), [], [], batching.read
    monkeypatch.setattr(batching, "read", lambda *given: reads.append(1) or read(*given))
    wanted = undisturbed(model, how)
    before = 2 * len(reads)

    def listen(index: int, token: int) -> None:
        told.append((index, token))
        if index == 0 and [one for one, _ in told].count(0) == at:
            raise Gone

    batcher = Batcher(model, page=16)
    requests = [
        batcher.submit(prompt, max_new_tokens=12, sampling=how, on_token=None if row == 2 else listen)
        for row, prompt in enumerate(PROMPTS)
    ]
    ended, raised = to_the_end(batcher, Gone)
    assert raised == 1 and [one.tokens for one in requests] == wanted
    assert sorted(one.index for one in ended) == [0, 1, 2] and all(one.finished for one in requests)
    assert all(one.live_tokens > 0 for one in requests) and len(reads) == before, "nothing was read again"
    for row in (0, 1):
        assert [token for index, token in told if index == row] == wanted[row]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("call", [3, 9])
def test_an_interruption_within_a_step_leaves_no_token_stored_twice(layer, call):
    """Some layers have taken the token, the others have not."""
    model, calls = gated().double(), []
    wanted = undisturbed(model)

    def interrupt(*_) -> None:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    batcher = Batcher(model, page=16)
    requests = [batcher.submit(prompt, max_new_tokens=12) for prompt in PROMPTS]
    model.model.layers[layer].register_forward_hook(interrupt)
    ended, raised = to_the_end(batcher, KeyboardInterrupt)
    assert raised == 1 and [one.tokens for one in requests] == wanted and len(ended) == 3


def test_who_ended_in_a_step_that_raised_is_returned_by_the_next(monkeypatch):
    model = gated().double()
    batcher = Batcher(model)
    short, long = (batcher.submit(PROMPTS[0], max_new_tokens=count) for count in (1, 5))
    with monkeypatch.context() as patch:
        patch.setattr(batcher, "_feed", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            batcher.step()
    assert short.finished and batcher.step() == [short]
    batcher.run()
    assert long.tokens == generate(model, [PROMPTS[0]], max_new_tokens=5).tokens[0].tolist()


def test_requests_that_could_not_join_wait_with_those_they_might_have_harmed(monkeypatch):
    model, absorb = gated().double(), PrunedCache.absorb
    wanted = undisturbed(model)

    def half(self, other) -> None:
        absorb(self, other)
        raise MemoryError

    batcher = Batcher(model, page=16, max_batch=3)
    first = batcher.submit(PROMPTS[0], max_new_tokens=12)
    batcher.step()
    others = [batcher.submit(prompt, max_new_tokens=12) for prompt in PROMPTS[1:]]
    with monkeypatch.context() as patch:
        patch.setattr(PrunedCache, "absorb", half)
        with pytest.raises(MemoryError):
            batcher.step()
    batcher.run()
    assert [one.tokens for one in (first, *others)] == wanted


def test_a_row_whose_protected_keys_outgrow_the_cap_fails_alone_and_says_so():
    """Its prompt fits, and its text no longer does."""
    model, pins = gated().double(), torch.ones(40, dtype=torch.bool)
    batcher = Batcher(model, max_live_tokens=24)
    good, bad = (batcher.submit(PROMPTS[0], max_new_tokens=12, pinned=pinned) for pinned in (None, pins))
    _, raised = to_the_end(batcher, UserError)
    alone = generate(model, [PROMPTS[0]], max_new_tokens=12, max_live_tokens=24).tokens[0].tolist()
    assert good.finished and good.tokens == alone and raised == 2
    assert not bad.finished and 0 < len(bad.tokens) < 12
    pinned = generate(model, [PROMPTS[0]], max_new_tokens=len(bad.tokens), pinned=[(0, 40)]).tokens[0].tolist()
    assert bad.tokens == pinned


@pytest.mark.parametrize("where", ["trim", "shrink", "absorb", "cat", "cat of logits"])
def test_whatever_fails_while_a_group_joins_loses_nobody(where, monkeypatch):
    model = gated().double()
    wanted = undisturbed(model)
    batcher = Batcher(model, page=16, max_batch=3)
    requests = [batcher.submit(PROMPTS[0], max_new_tokens=12)]
    batcher.step()
    requests += [batcher.submit(prompt, max_new_tokens=12) for prompt in PROMPTS[1:]]
    (name, *of), place = where.split(), torch if "cat" in where else PrunedCache
    with monkeypatch.context() as patch:
        original = getattr(place, name)

        def fails(*given, **more):
            found = original(*given, **more)
            if of and found.ndim != 2:
                return found
            raise MemoryError

        patch.setattr(place, name, fails)
        with pytest.raises(MemoryError):
            batcher.step()
    batcher.run()
    assert [one.tokens for one in requests] == wanted and not batcher.running and not batcher.waiting


def test_one_that_is_refused_lets_the_others_go_on_without_reading_them_again(monkeypatch):
    model, reads, read = gated().double(), [], batching.read
    batcher = Batcher(model, max_live_tokens=6)
    good = batcher.submit(PROMPTS[0], max_new_tokens=12)
    batcher.step()
    bad = batcher.submit(PROMPTS[0], max_new_tokens=12, pinned=torch.ones(40, dtype=torch.bool))
    monkeypatch.setattr(batching, "read", lambda *given: reads.append(given[2]) or read(*given))
    _, raised = to_the_end(batcher, UserError)
    assert raised == 1 and good.finished and not bad.tokens and reads == [[bad]]


def test_what_was_thrown_away_is_free_at_once():
    """Before anything is read again: caches are cycles, which nobody collects in time."""
    model = gated().double()
    batcher = Batcher(model, page=16)
    for prompt in PROMPTS:
        batcher.submit(prompt, max_new_tokens=12)
    for _ in range(3):
        batcher.step()
    pages = [weakref.ref(layer.pages.keys) for layer in batcher.cache.held]
    gc.disable()
    try:
        batcher._put_back()
        assert [one() for one in pages] == [None] * len(pages)
    finally:
        gc.enable()


def test_what_was_full_is_free_when_fewer_are_read(monkeypatch):
    """The pool's bytes are those of one reading, not of all that were tried."""
    model, seen, left, read = gated(beta=1e4).double(), [], [], batching.read

    def watched(model, cache, group, chunk):
        left.append(sum(pages() is not None for pages in seen))
        try:
            return read(model, cache, group, chunk)
        finally:
            seen.extend(weakref.ref(layer.pages.keys) for layer in cache.held)

    monkeypatch.setattr(batching, "read", watched)
    batcher = Batcher(model, max_cache_bytes=4 * LAYERS * page_bytes(model, 16), page=16, prefill_chunk=8)
    batcher.expectation.kept = 0.1  # so that all are read together, in vain
    for row in range(4):
        batcher.submit(tokens(1, 20, seed=row)[0], max_new_tokens=2)
    gc.disable()
    try:
        batcher.step()
    finally:
        gc.enable()
    assert len(left) > 1 and left[1] == 0 and batcher.running
