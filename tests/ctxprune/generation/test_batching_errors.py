"""Does a batcher that could not do what was asked go on with the others, tell the truth and keep to its memory?"""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
import transformers as tf

import ctxprune
from ctxprune import UserError, generate
from ctxprune.generation.batching import Batcher
from ctxprune.generation.prefill import prefill
from ctxprune.generation.prompts import check_prompt, page_bytes
from ctxprune.policies import Budget, SnapKVConfig
from tests.models import GROUPED, LAYERS, gated, small_model, tokens


def test_what_was_written_before_the_pool_was_full_stays_true_and_others_are_served():
    model = gated(beta=1e4).double()
    batcher = Batcher(model, max_cache_bytes=3 * LAYERS * page_bytes(model, 16), page=16)
    long = batcher.submit(tokens(1, 30)[0], max_new_tokens=40)
    short = batcher.submit(tokens(1, 12, seed=5)[0], max_new_tokens=10)
    with pytest.raises(UserError, match="too small for a sequence of"):
        batcher.run()
    written = list(long.tokens)
    batcher.run()
    assert long.tokens == written and not long.finished and short.finished and not batcher.running
    wanted = [generate(model, [one.prompt], max_new_tokens=40).tokens[0].tolist() for one in (long, short)]
    assert written == wanted[0][: len(written)] and len(written) > 8
    assert short.tokens == wanted[1][:10]


def test_who_cannot_be_served_takes_nobody_along():
    model, pins = gated().double(), torch.ones(40, dtype=torch.bool)
    batcher = Batcher(model, max_live_tokens=4)
    good, bad, late = (
        batcher.submit(tokens(1, 20, seed=seed)[0], max_new_tokens=6, pinned=pins if seed == 1 else None)
        for seed in range(3)
    )
    with pytest.raises(UserError, match="fewer than the tokens that are protected"):
        batcher.run()
    batcher.run()
    assert good.finished and late.finished and not bad.tokens and not batcher.waiting
    for one in (good, late):
        assert one.tokens == generate(model, [one.prompt], max_new_tokens=6, max_live_tokens=4).tokens[0].tolist()


def test_an_accident_while_prompts_are_read_loses_nobody(monkeypatch):
    model = gated().double()
    batcher = Batcher(model)
    requests = [batcher.submit(tokens(1, 20, seed=seed)[0], max_new_tokens=6) for seed in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr("ctxprune.generation.batching.read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            batcher.run()
    batcher.run()
    assert [one.tokens for one in requests] == [
        generate(model, [one.prompt], max_new_tokens=6).tokens[0].tolist() for one in requests
    ]


@pytest.mark.parametrize("much", [1.0, 1.3, 1.6, 1.9, 2.8])
def test_the_pool_is_never_exceeded_by_layers_that_are_new(much):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 12})).eval()
    model = ctxprune.retrofit(model, ctxprune.GateConfig(rank=4, beta=3.0))
    limit, ids = int(12 * much * page_bytes(model, 64)), tokens(6, 10)
    found = generate(model, ids, max_new_tokens=12, max_cache_bytes=limit)
    assert found.peak_cache_bytes <= limit
    assert [row.tolist() for row in found.tokens] == [
        row.tolist() for row in generate(model, ids, max_new_tokens=12).tokens
    ]


@pytest.mark.parametrize("seed", range(4))
def test_in_depth_a_cap_keeps_the_same_keys_whatever_the_chunks(seed):
    """A slot that is taken again within a chunk must not hide from the layer below that its key went."""
    model, ids = gated(propagate_in_depth=True, beta=1.0, seed=seed).double(), tokens(1, 120, seed=seed)
    found = []
    for chunk in (1, 7, 0):
        cache = ctxprune.PrunedCache(max_live_tokens=8)
        with torch.inference_mode():
            logits = prefill(model, cache, [ids[0]], chunk)
        found.append((cache.positions(), logits))
        held = [set(layer[0]) for layer in cache.positions()]
        assert all(below <= above for above, below in pairwise(held))
    for positions, logits in found[1:]:
        assert positions == found[0][0]
        torch.testing.assert_close(logits, found[0][1], rtol=0, atol=1e-10)


def test_the_peak_counts_what_chunks_hold_before_the_prompts_end():
    """A rule that drops where the prompt ends keeps all of it until then, here six pages a layer."""
    model = ctxprune.retrofit(small_model(), SnapKVConfig(Budget(share=0.25), window=4)).double()
    batcher = Batcher(model, page=16, prefill_chunk=32)
    batcher.submit(tokens(1, 112)[0], max_new_tokens=2)
    batcher.step()
    assert batcher.peak_cache_bytes >= LAYERS * 5 * page_bytes(model, 16) > batcher.cache.allocated_bytes()


def test_the_peak_counts_what_an_alarm_keeps():
    model = gated(beta=0.0).double()
    batcher = Batcher(model, page=16, alarm=ctxprune.Alarm(0.5))
    batcher.submit(tokens(1, 100)[0], max_new_tokens=8)
    for _ in range(6):
        batcher.step()
    cold = sum(store.allocated_bytes() for store in batcher.alarm.cold)
    assert cold > 0 and batcher.peak_cache_bytes >= batcher.cache.allocated_bytes() + cold


def test_an_alarm_and_the_models_own_window_do_not_go_together():
    with pytest.raises(UserError, match="own sliding window"):
        generate(gated("mistral-sliding"), tokens(1, 30), alarm=ctxprune.Alarm(0.5))


@pytest.mark.parametrize("prompt", [torch.tensor(3), [1, 2, 3], tokens(1, 9), torch.ones(4)])
def test_what_is_no_row_of_token_ids_is_one_line(prompt):
    unchecked = inspect.unwrap(check_prompt)  # tests see types checked, people do not
    with pytest.raises(UserError, match="a prompt is a 1-D tensor of token ids") as caught:
        unchecked(gated(), prompt, 4)
    assert "\n" not in str(caught.value)
