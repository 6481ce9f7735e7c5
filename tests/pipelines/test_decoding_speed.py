"""Is what is timed the real thing: the dropped keys gone, the dense run whole, both on the same text?"""

from __future__ import annotations

import torch

from ctxprune.drop_time import drop_times
from ctxprune.retrofitting import mode, state_of
from pipelines.decoding_speed import compare, decode
from tests.models import LAYERS, gated, tokens


def test_the_dense_cache_holds_every_token_and_the_pruned_one_what_drop_times_leave():
    model, ids = gated("llama"), tokens(3, 40)
    record = compare(model, ids, prompt=20, repeats=2, advance=lambda done: None)
    with mode(model, "dense"):
        dense = decode(model, ids, 20)
    per_token = dense.live_bytes // (LAYERS * 3 * 40)
    assert record["cache_bytes_dense"] == dense.live_bytes == per_token * LAYERS * 3 * 40
    alive = int((drop_times(model, ids).drop_time >= 40).sum())
    rank = state_of(model).policy.rank
    assert record["cache_bytes"] == alive * (per_token + rank * 4)
    assert record["cache_bytes"] < record["cache_bytes_dense"]


def test_rates_and_times_agree_and_lie_within_their_spread():
    record = compare(gated("llama"), tokens(2, 24), prompt=16, repeats=3, advance=lambda done: None)
    low, high = record["tokens_per_second_spread"]
    assert low <= record["tokens_per_second"] <= high
    assert abs(record["ms_per_token"] * record["tokens_per_second"] - 2 * 1e3) < 1e-6


def test_a_pass_leaves_the_model_and_the_text_as_they_were():
    model, ids = gated("gpt2"), tokens(2, 24)
    before = ids.clone()
    reference = model(ids, use_cache=False).logits
    decode(model, ids, 8)
    assert torch.equal(ids, before) and torch.equal(model(ids, use_cache=False).logits, reference)
