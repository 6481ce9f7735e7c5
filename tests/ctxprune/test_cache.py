"""Does the cache hold the survivors and nothing else, and give memory back?"""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import ctxprune
from ctxprune import PrunedCache
from ctxprune.cache import EMPTY, Slots, compact
from ctxprune.retrofitting import wrappers
from tests.models import LAYERS, decode, gated, small_model, tokens

PER_TOKEN = (2 * 2 * 8 + 4) * 4
"""Bytes of one token in one layer of the small Llama: 2 key/value heads of 8, rank 4, float32."""


def after(model, ids, chunks) -> PrunedCache:
    *_, (_, cache, _) = decode(model, ids, chunks)
    return cache


def steps(prompt: int, n: int) -> list[int]:
    return [prompt] + [1] * (n - prompt)


def set_beta(model, value: float) -> None:
    for wrapper in wrappers(model):
        wrapper.rule.gate.beta.data.fill_(value)


def test_live_bytes_count_keys_values_and_interaction_keys_of_survivors_alone():
    model, ids = gated(), tokens(2, 30)
    cache = after(model, ids, steps(10, 30))
    times = ctxprune.drop_times(model, ids).drop_time
    survivors = int((times >= 30).sum())
    assert cache.live_tokens().tolist() == (times >= 30).sum(2).tolist()
    assert cache.live_bytes() == survivors * PER_TOKEN
    held = sum(t.numel() * 4 for s in cache.slots for t in (s.keys, s.values, s.interaction))
    assert cache.allocated_bytes() == held >= cache.live_bytes()


def test_a_prompt_takes_only_the_room_of_its_survivors():
    model, ids = gated(), tokens(2, 40)
    cache = after(model, ids, [40])
    survivors = (ctxprune.drop_times(model, ids).drop_time >= 40).sum(2)
    assert [slots.position.shape[1] for slots in cache.slots] == survivors.max(1).values.tolist()
    assert cache.get_seq_length() == 40


def test_slots_are_reused_when_every_token_drops():
    model, ids = gated(), tokens(2, 60)
    set_beta(model, -1e4)
    sizes = [cache.allocated_bytes() for _, cache, _ in decode(model, ids, steps(10, 60))]
    assert set(sizes) == {LAYERS * 2 * PER_TOKEN}
    cache = after(model, ids, steps(10, 60))
    assert cache.live_tokens().unique().tolist() == [1]


def test_capacity_shrinks_after_a_wave_of_drops():
    model, ids = gated(), tokens(2, 60)
    set_beta(model, 1e4)
    cache = after(model, ids[:, :50], [50])
    full = cache.allocated_bytes()
    set_beta(model, -1e4)
    with torch.no_grad():
        model(ids[:, 50:51], past_key_values=cache, use_cache=True)
    assert cache.allocated_bytes() == full
    cache.shrink()
    assert cache.allocated_bytes() == LAYERS * 2 * PER_TOKEN
    with torch.no_grad():
        model(ids[:, 51:52], past_key_values=cache, use_cache=True)
    assert cache.live_tokens().unique().tolist() == [1]


def test_shrinking_changes_no_logit():
    model, ids = gated().double(), tokens(2, 40)
    kept = after(model, ids[:, :30], [30])
    shrunk = after(model, ids[:, :30], [30])
    shrunk.slots = [compact(slots) for slots in shrunk.slots]
    with torch.no_grad():
        for step in range(30, 40):
            inputs = ids[:, step : step + 1]
            one = model(inputs, past_key_values=kept, use_cache=True).logits
            two = model(inputs, past_key_values=shrunk, use_cache=True).logits
            shrunk.slots = [compact(slots) for slots in shrunk.slots]
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_compacting_keeps_every_live_token_and_its_numbers():
    position = torch.tensor([[EMPTY, 4, EMPTY, 2], [0, EMPTY, EMPTY, EMPTY]])
    keys = torch.arange(2 * 1 * 4 * 2.0).view(2, 1, 4, 2)
    slots = compact(Slots(keys, keys + 0.5, None, position, None))
    assert slots.position.tolist() == [[4, 2], [0, EMPTY]]
    assert torch.equal(slots.keys[0, 0], keys[0, 0, [1, 3]]) and torch.equal(slots.keys[1, 0, 0], keys[1, 0, 0])
    assert torch.equal(slots.values[:, :, 0], slots.keys[:, :, 0] + 0.5)


@pytest.mark.parametrize("dense", [False, True])
@torch.no_grad()
def test_selected_rows_go_on_as_if_alone(dense):
    model, ids = gated().double(), tokens(3, 30)
    with ctxprune.mode(model, "dense" if dense else "hard"):
        together, alone = after(model, ids[:, :20], [20]), after(model, ids[[2, 0], :20], [20])
        together.select(torch.tensor([2, 0]))
        assert torch.equal(together.live_tokens(), alone.live_tokens())
        assert together.allocated_bytes() == alone.allocated_bytes()
        for step in range(20, 30):
            inputs = ids[[2, 0], step : step + 1]
            one = model(inputs, past_key_values=together, use_cache=True).logits
            two = model(inputs, past_key_values=alone, use_cache=True).logits
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_row_is_independent_of_its_neighbours_bitwise_where_the_buffers_have_one_shape():
    model, ids = gated(), tokens(2, 30)
    other = ids.clone()
    other[1] = tokens(1, 30, seed=9)
    shapes = [0, 0]
    for (_, one, first), (_, two, second) in zip(
        decode(model, ids, [1] * 30), decode(model, other, [1] * 30), strict=True
    ):
        widths = [[slots.position.shape[1] for slots in cache.slots] for cache in (one, two)]
        # Where a neighbour needs a wider buffer, sums are cut elsewhere and the last bit may differ.
        same = widths[0] == widths[1]
        shapes[same] += 1
        if same:
            assert torch.equal(first[0], second[0])
        assert torch.allclose(first[0], second[0], atol=1e-5)
    assert shapes[True] >= 10


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral-sliding"])
@torch.no_grad()
def test_in_dense_mode_it_equals_transformers_own_cache(family):
    ids, original, model = tokens(2, 30), small_model(family), gated(family)
    theirs, ours = tf.DynamicCache(config=original.config), PrunedCache()
    with ctxprune.mode(model, "dense"):
        for part in [slice(0, 10), *(slice(i, i + 1) for i in range(10, 30))]:
            wanted = original(ids[:, part], past_key_values=theirs, use_cache=True).logits
            given = model(ids[:, part], past_key_values=ours, use_cache=True).logits
            torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)
    if family != "mistral-sliding":
        assert ours.live_bytes() == 2 * sum(layer.keys.numel() for layer in theirs.layers) * 4
