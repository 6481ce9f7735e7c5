"""Do many requests share a model and a pool so that each is served as if it were alone?"""

from __future__ import annotations

import gc
import os
import random
import weakref

import pytest
import torch

import ctxprune
from ctxprune import UserError, generate
from ctxprune.cache.layer_cache import LayerCache
from ctxprune.cache.page_pool import PagePool
from ctxprune.generation import batching
from ctxprune.generation.batching import Batcher
from ctxprune.generation.prompts import page_bytes
from ctxprune.generation.sampling import Sampling
from tests.models import LAYERS, VOCAB, gated, small_model, tokens

REQUESTS = int(os.environ.get("CTXPRUNE_REQUESTS", "300"))
"""In the soak."""


def prompts_of(*lengths: int) -> list[torch.Tensor]:
    return [tokens(1, n, seed=n)[0] for n in lengths]


def alone(model, prompts, count: int = 12, **how) -> list[list[int]]:
    return [generate(model, [prompt], max_new_tokens=count, **how).tokens[0].tolist() for prompt in prompts]


def test_requests_join_and_leave_and_each_is_as_if_alone():
    model, prompts = gated().double(), prompts_of(3, 40, 11, 8, 25, 1, 60)
    batcher = Batcher(model, max_batch=3, page=16)
    requests = [batcher.submit(prompt, max_new_tokens=4 + 3 * i) for i, prompt in enumerate(prompts)]
    ended, most = [], 0
    while batcher.waiting or batcher.running:
        ended += batcher.step()
        most = max(most, len(batcher.running))
    assert most == 3 and sorted(one.index for one in ended) == list(range(7))
    for i, (prompt, one) in enumerate(zip(prompts, requests, strict=True)):
        assert one.tokens == alone(model, [prompt], 4 + 3 * i)[0]


def test_requests_may_come_while_others_are_written():
    model, (first, second) = gated().double(), prompts_of(20, 9)
    batcher = Batcher(model)
    one = batcher.submit(first, max_new_tokens=12)
    for _ in range(5):
        batcher.step()
    two = batcher.submit(second, max_new_tokens=12)
    batcher.run()
    assert [one.tokens, two.tokens] == alone(model, [first, second])


def test_dense_rows_take_their_pages_at_once_and_give_them_back(monkeypatch):
    """The pool is copied for the first page and when enough rows have left, not as each row grows."""
    model, copied = gated().double(), []
    resize = PagePool._resize
    monkeypatch.setattr(PagePool, "_resize", lambda pool, capacity: (copied.append(capacity), resize(pool, capacity)))
    with ctxprune.mode(model, "dense"):
        batcher = Batcher(model, page=16, max_batch=4)
        for row, prompt in enumerate(prompts_of(40, 40, 40, 40)):
            batcher.submit(prompt, max_new_tokens=16 if row else 2)
        batcher.run()
    # 3 pages a row at first; at the end 4, but for the first.
    assert copied[:LAYERS] == [4 * 3 + 3] * LAYERS
    assert all(capacity < 4 * 3 + 3 for capacity in copied[LAYERS:])


def test_a_full_pool_lets_the_youngest_wait_and_loses_nothing():
    model, prompts = gated(beta=1e4).double(), prompts_of(30, 31, 32, 33)
    pool = 9 * LAYERS * page_bytes(model, 16)  # 3 pages a prompt, 5 at the end
    batcher = Batcher(model, max_cache_bytes=pool, page=16)
    requests = [batcher.submit(prompt, max_new_tokens=40, sampling=Sampling(1.0, seed=7)) for prompt in prompts]
    sizes = []
    while batcher.waiting or batcher.running:
        batcher.step()
        sizes.append(batcher.cache.allocated_bytes())
    assert max(sizes) <= pool and batcher.peak_cache_bytes <= pool
    assert sum(one.pauses for one in requests) > 0 and batcher.most_running > 1
    written = alone(model, prompts, 40, temperature=1.0, seed=7)
    assert [one.tokens for one in requests] == written


def test_a_pruned_pool_holds_more_sequences(monkeypatch):
    """80 % dropped: five times the rows of a pool that a dense model fills with them."""
    model = ctxprune.retrofit(small_model(), ctxprune.WindowConfig(widths=(20, 20, 20))).double()
    prompts = prompts_of(*[96] * 20)
    pool, most, reads, original = 7 * 4 * LAYERS * page_bytes(model, 16), {}, [], batching.read
    monkeypatch.setattr(batching, "read", lambda *given: reads.append(len(given[2])) or original(*given))
    for mode in ("dense", "hard"):
        with ctxprune.mode(model, mode):
            batcher = Batcher(model, max_cache_bytes=pool, page=16, prefill_chunk=16)
            for prompt in prompts:
                batcher.submit(prompt, max_new_tokens=8)
            batcher.run()
            most[mode] = batcher.most_running
    assert most["hard"] >= 3 * most["dense"] > 0
    # No prompt is read in vain, over and over, because its chunk did not fit.
    assert sum(reads) <= 1.5 * 2 * len(prompts)


@pytest.mark.timeout(600)
def test_soak(monkeypatch):
    """Requests of random length through one batcher: nothing lost, nothing twice, memory as it was."""
    alive, original = weakref.WeakSet(), LayerCache.__init__
    monkeypatch.setattr(LayerCache, "__init__", lambda layer, *a, **k: alive.add(layer) or original(layer, *a, **k))
    model, choose, heard = gated(), random.Random(0), []
    pool = 40 * LAYERS * page_bytes(model, 16)
    batcher, ended, sizes = Batcher(model, max_batch=16, max_cache_bytes=pool, page=16), [], []
    todo = [(choose.randint(1, 40), choose.randint(1, 12)) for _ in range(REQUESTS)]
    for length, count in todo:
        batcher.submit(
            torch.tensor([choose.randrange(VOCAB) for _ in range(length)]),
            max_new_tokens=count,
            sampling=Sampling(temperature=1.0, seed=length),
            on_token=lambda index, token: heard.append(index),
        )
    while batcher.waiting or batcher.running:
        ended += batcher.step()
        sizes.append(batcher.cache.allocated_bytes())
    assert sorted(one.index for one in ended) == list(range(REQUESTS))
    assert [len(one.tokens) for one in sorted(ended, key=lambda one: one.index)] == [count for _, count in todo]
    assert sorted(heard) == sorted(index for index, (_, count) in enumerate(todo) for _ in range(count))
    assert 0 < max(sizes) <= pool and batcher.cache.held == [] and batcher.cache.allocated_bytes() == 0
    gc.collect()
    assert len(alive) == 0


def test_a_request_too_large_for_its_pool_is_told_so():
    model = gated(beta=1e4)
    with pytest.raises(UserError, match="one sequence takes at least"):
        Batcher(model, max_cache_bytes=100)
    pool = 3 * LAYERS * page_bytes(model, 16)
    batcher = Batcher(model, max_cache_bytes=pool, page=16)
    batcher.submit(tokens(1, 60)[0])
    with pytest.raises(UserError, match="too small for the request of 60 tokens"):
        batcher.run()
    batcher = Batcher(model, max_cache_bytes=pool, page=16)
    batcher.submit(tokens(1, 30)[0], max_new_tokens=40)
    with pytest.raises(UserError, match="too small for a sequence of"):
        batcher.run()
    with ctxprune.mode(model, "dense"), pytest.raises(UserError, match="this request needs"):
        Batcher(model, max_cache_bytes=pool, page=16).submit(tokens(1, 30)[0], max_new_tokens=40)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_cache_bytes": 0}, "max_cache_bytes is 0"),
        ({"prefill_chunk": -1}, "prefill_chunk is -1"),
        ({"max_live_tokens": 0}, "max_live_tokens is 0"),
        ({"pinned": [(3, 3)]}, "pinned span"),
        ({"pinned": [(-1, 2)]}, "pinned span"),
    ],
)
def test_settings_out_of_range_are_refused_before_any_work(how, named):
    with pytest.raises(UserError, match=named) as caught:
        generate(gated(), tokens(1, 4), **how)
    assert "\n" not in str(caught.value)


class TestCap:
    """max_live_tokens."""

    @pytest.mark.parametrize("policy", ["gates", "window"])
    @pytest.mark.parametrize("chunk", [0, 1, 7, 64])
    def test_it_is_never_exceeded_and_chunks_do_not_matter(self, policy, chunk):
        model = gated(sinks=1, recent=2).double()
        if policy == "window":
            rule = ctxprune.WindowConfig(widths=(5, 40, 40), sinks=1)
            model = ctxprune.retrofit(small_model(), rule).double()
        prompts, found = prompts_of(50, 7, 33), {}
        for length in (chunk, 5):
            batcher = Batcher(model, max_live_tokens=9, prefill_chunk=length, page=16)
            requests = [batcher.submit(prompt, max_new_tokens=15) for prompt in prompts]
            kept = []
            while batcher.waiting or batcher.running:
                batcher.step()
                if batcher.cache.held:
                    assert batcher.cache.live_tokens().max() <= 9
                    kept.append(batcher.cache.positions())
            found[length] = [one.tokens for one in requests], kept
        assert found[chunk] == found[5]
        assert found[5][0] != alone(model, prompts, 15)

    def test_a_cap_that_never_binds_changes_nothing(self):
        model, prompts = gated().double(), prompts_of(20, 9)
        assert alone(model, prompts, max_live_tokens=60) == alone(model, prompts)

    def test_the_lowest_logit_goes_first_and_without_gates_the_oldest(self):
        model, ids = gated(beta=1e4).double(), tokens(1, 30)
        gate = ctxprune.retrofitting.wrappers(model)[0].rule.gate
        cache = ctxprune.PrunedCache(max_live_tokens=8)
        with torch.no_grad():
            model(ids[:, :8], past_key_values=cache, use_cache=True)
            seen = []
            ctxprune.retrofitting.wrappers(model)[0].register_forward_pre_hook(
                lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"])[0]) and None,
                with_kwargs=True,
            )
            model(ids[:, 8:9], past_key_values=cache, use_cache=True)
            x = gate.key(model.model.layers[0].input_layernorm(model.model.embed_tokens(ids[0, :8]))) @ gate.query(
                seen[0][0]
            )
        assert set(range(9)) - set(cache.positions()[0][0]) == {int(x.argmin())}
        window = ctxprune.retrofit(small_model(), ctxprune.WindowConfig(widths=(99, 99, 99), sinks=2))
        cache = ctxprune.PrunedCache(max_live_tokens=8)
        with torch.no_grad():
            for step in range(20):
                window(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
        assert cache.positions() == [[[0, 1, *range(14, 20)]]] * LAYERS

    def test_more_protected_tokens_than_it_allows_is_an_error(self):
        with pytest.raises(UserError, match="fewer than the tokens that are protected"):
            generate(gated(sinks=3, recent=4), tokens(1, 30), max_live_tokens=5)


class TestPinned:
    """Spans that nothing drops."""

    @pytest.mark.parametrize("chunk", [0, 1, 5])
    @pytest.mark.parametrize("policy", ["gates", "window"])
    def test_pinned_tokens_outlive_everything(self, policy, chunk):
        model = gated(beta=-1e4) if policy == "gates" else None
        model = model or ctxprune.retrofit(small_model(), ctxprune.WindowConfig(widths=(2, 3, 4)))
        batcher, pinned = Batcher(model.double(), prefill_chunk=chunk), torch.zeros(30, dtype=torch.bool)
        pinned[2:5] = True
        batcher.submit(tokens(1, 20)[0], max_new_tokens=10, pinned=pinned)
        batcher.submit(tokens(1, 19)[0], max_new_tokens=10)
        for _ in range(8):
            batcher.step()
        window = [1, 1, 1] if policy == "gates" else [2, 3, 4]
        for layer, (with_pins, without) in enumerate(batcher.cache.positions()):
            recent = list(range(28 - window[layer], 28))
            assert with_pins == [2, 3, 4, *recent]
            assert without == [position - 1 for position in recent]

    def test_they_change_what_is_written_and_not_what_neighbours_write(self):
        model, prompts = gated(beta=0.5).double(), prompts_of(20, 21)
        free = alone(model, prompts)
        batcher = Batcher(model)
        pinned = torch.ones(40, dtype=torch.bool)
        pins = [pinned, None]
        requests = [batcher.submit(p, max_new_tokens=12, pinned=pin) for p, pin in zip(prompts, pins, strict=True)]
        batcher.run()
        with ctxprune.mode(model, "dense"):
            assert requests[0].tokens == alone(model, prompts[:1])[0]
        assert requests[1].tokens == free[1]
        assert alone(model, prompts[:1], pinned=[(0, 40)])[0] == requests[0].tokens
