"""Does the cache hold the survivors and nothing else, and give memory back?"""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import ctxprune
from ctxprune import PrunedCache
from ctxprune.cache.layer_cache import LayerCache
from ctxprune.cache.page_pool import STORED, PagePool
from ctxprune.kernels.decode.pages import NEVER
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


def bytes_of(cache: PrunedCache) -> int:
    """Of all that the pages are made of."""
    buffers = [getattr(layer.pages, name) for layer in cache.held for name in STORED]
    return sum(buffer.numel() * buffer.element_size() for buffer in buffers if buffer is not None)


def test_live_bytes_count_keys_values_and_interaction_keys_of_survivors_alone():
    model, ids = gated(), tokens(2, 30)
    cache = after(model, ids, steps(10, 30))
    times = ctxprune.drop_times(model, ids).drop_time
    survivors = int((times >= 30).sum())
    assert cache.live_tokens().tolist() == (times >= 30).sum(2).tolist()
    assert cache.live_bytes() == survivors * PER_TOKEN
    assert cache.allocated_bytes() == bytes_of(cache) >= cache.used_bytes() >= cache.live_bytes()


@pytest.mark.parametrize("page", [16, 32])
def test_a_prompt_takes_only_the_pages_of_its_survivors(page):
    model, ids = gated(), tokens(2, 100)
    cache = PrunedCache(page=page)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    survivors = (ctxprune.drop_times(model, ids).drop_time >= 100).sum(2)
    assert [layer.in_use for layer in cache.held] == (-(-survivors // page)).sum(1).tolist()
    assert cache.get_seq_length() == 100


def test_slots_are_reused_when_every_token_drops():
    model, ids, cache = gated(), tokens(2, 100), PrunedCache(page=16)
    set_beta(model, -1e4)
    with torch.no_grad():
        for step in range(100):
            model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            assert all(layer.in_use == 2 for layer in cache.held)
            assert cache.live_tokens().unique().tolist() == [1]


def test_pages_of_what_is_expected_are_taken_at_once_and_kept(monkeypatch):
    """The pool is copied for the first page and never again, whoever joins or leaves, until it is trimmed."""
    model, ids, copied = gated(), tokens(4, 100), []
    resize = PagePool._resize
    monkeypatch.setattr(PagePool, "_resize", lambda pool, capacity: (copied.append(capacity), resize(pool, capacity)))
    cache = PrunedCache(page=16)
    cache.expected = torch.tensor([100, 100, 100, 100])
    with torch.no_grad(), ctxprune.mode(model, "dense"):
        for end in range(20, 101, 20):
            model(ids[:, end - 20 : end], past_key_values=cache, use_cache=True)
        cache.select(torch.tensor([2]))
    assert copied == [4 * 7] * LAYERS and [layer.in_use for layer in cache.held] == [7] * LAYERS
    cache.trim()
    assert copied[LAYERS:] == [7] * LAYERS


def test_capacity_shrinks_after_a_wave_of_drops():
    model, ids = gated(), tokens(2, 128)
    set_beta(model, 1e4)
    cache = PrunedCache(page=16)
    with torch.no_grad():
        model(ids[:, :120], past_key_values=cache, use_cache=True)
        assert [layer.in_use for layer in cache.held] == [16] * LAYERS
        set_beta(model, -1e4)
        model(ids[:, 120:121], past_key_values=cache, use_cache=True)
        full = cache.allocated_bytes()
        cache.shrink()
        assert [layer.in_use for layer in cache.held] == [2] * LAYERS
        assert cache.allocated_bytes() == bytes_of(cache) == full // 8
        model(ids[:, 121:122], past_key_values=cache, use_cache=True)
    assert cache.live_tokens().unique().tolist() == [1]


def test_shrinking_changes_no_logit():
    model, ids = gated().double(), tokens(3, 110)
    kept, shrunk = PrunedCache(page=16), PrunedCache(page=16)
    with torch.no_grad():
        for cache in (kept, shrunk):
            model(ids[:, :90], past_key_values=cache, use_cache=True)
        for step in range(90, 110):
            inputs = ids[:, step : step + 1]
            one = model(inputs, past_key_values=kept, use_cache=True).logits
            two = model(inputs, past_key_values=shrunk, use_cache=True).logits
            shrunk.shrink(0.0)
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
            assert kept.positions() == shrunk.positions()


def layer_of(rows: list[int], page: int = 16) -> LayerCache:
    """Rows of that many tokens, whose every number is its position, plus 1000 times its row."""
    layer = LayerCache(len(rows), kv_heads=1, width=2, rank=3, page=page)
    add(layer, rows)
    return layer


def add(layer: LayerCache, tokens: list[int]) -> None:
    longest = max(tokens)
    first = torch.tensor([len(row) for row in layer.positions(torch.full((layer.rows,), -1))])[:, None]
    column = torch.arange(longest).expand(len(tokens), -1)
    step = torch.where(column < torch.tensor(tokens)[:, None], first + column, -1).int()
    number = (step + 1000 * torch.arange(len(tokens))[:, None]).float()
    layer.make_room_for(torch.tensor(tokens))
    key = number[:, None, :, None].expand(-1, 1, -1, 2)
    layer.pages.store(key, -key, number[..., None].expand(-1, -1, 3), step, step + 1, torch.full_like(step, NEVER))


def whole(layer: LayerCache, rows: list[int], step: torch.Tensor | None = None) -> bool:
    """Whether each row holds keys, values and interaction keys of its own positions and nothing else (rows: which row
    each was)."""
    table, pages, good = layer.pages.table.tolist(), layer.pages, True
    step = torch.full((len(rows),), 0) if step is None else step
    for place, row in enumerate(rows):
        for page in (page for page in table[place] if page >= 0):
            alive = pages.drop_time[page] > step[place]
            number = pages.position[page][alive] + 1000 * row
            good &= bool((pages.keys[page, 0][alive] == number[:, None]).all())
            good &= bool((pages.values[page, 0][alive] == -number[:, None]).all())
            good &= bool((pages.interaction[page][alive] == number[:, None]).all())
    used = [page for row in table for page in row if page >= 0]
    return good and sorted(used) == list(range(layer.in_use))


def test_rows_keep_their_numbers_whatever_moves():
    """Random lives: rows grow, keys drop, rows are compacted, selected, doubled and joined, pages never shared."""
    generator = torch.Generator().manual_seed(0)

    def random(high: int, count: int) -> list[int]:
        return torch.randint(0, high, (count,), generator=generator).tolist()

    for _ in range(20):
        layer, rows = layer_of(random(60, 4)), [0, 1, 2, 3]
        assert whole(layer, rows)
        for action in random(4, 6):
            if action == 0:
                order = layer.pages.order
                gone = torch.rand(layer.pages.drop_time[order.pages].shape, generator=generator) < 0.6
                layer.pages.drop_time[order.pages] = layer.pages.drop_time[order.pages].masked_fill(gone, 0)
            elif action == 1:
                before = layer.positions(torch.zeros(len(rows)))
                layer.compact(torch.zeros(len(rows)))
                assert layer.positions(torch.zeros(len(rows))) == before
                assert layer.in_use == sum(-(-len(row) // 16) for row in before)
            elif action == 2:
                chosen = random(len(rows), 3)
                layer.select(torch.tensor(chosen))
                rows = [rows[place] for place in chosen]
            else:
                other = layer_of(random(40, 2))
                layer.absorb(other)
                rows = [*rows, 0, 1]
            assert whole(layer, rows)
        layer.select(torch.tensor([], dtype=torch.long))
        assert layer.in_use == 0 and layer.allocated_bytes() == layer.page_bytes()


@pytest.mark.parametrize("dense", [False, True])
@torch.no_grad()
def test_selected_rows_go_on_as_if_alone(dense):
    model, ids = gated().double(), tokens(3, 30)
    with ctxprune.mode(model, "dense" if dense else "hard"):
        together, alone = after(model, ids[:, :20], [20]), after(model, ids[[2, 0], :20], [20])
        together.select(torch.tensor([2, 0]))
        assert torch.equal(together.live_tokens(), alone.live_tokens())
        assert together.used_bytes() == alone.used_bytes() and together.positions() == alone.positions()
        for step in range(20, 30):
            inputs = ids[[2, 0], step : step + 1]
            one = model(inputs, past_key_values=together, use_cache=True).logits
            two = model(inputs, past_key_values=alone, use_cache=True).logits
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_a_row_is_independent_of_its_neighbours():
    model, ids = gated(), tokens(2, 30)
    other = ids.clone()
    other[1] = tokens(1, 30, seed=9)
    for (_, one, first), (_, two, second) in zip(
        decode(model, ids, [1] * 30), decode(model, other, [1] * 30), strict=True
    ):
        # How a product is cut into threads depends on how many pages there are: the last bit may differ.
        assert torch.allclose(first[0], second[0], atol=1e-5)
        assert [rows[0] for rows in one.positions()] == [rows[0] for rows in two.positions()]


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


@torch.no_grad()
def test_tokens_taken_back_leave_no_trace():
    """Twenty tokens, seven of them taken back and others fed in their place: as if these alone had come."""
    model, ids, other = gated(sinks=1).double(), tokens(2, 30), tokens(2, 30, seed=5)
    straight, cropped = PrunedCache(page=16), PrunedCache(page=16, reversible=True)
    text = torch.cat([ids[:, :13], other[:, 13:]], 1)
    model(ids[:, :10], past_key_values=cropped, use_cache=True)
    for step in range(10, 20):
        model(ids[:, step : step + 1], past_key_values=cropped, use_cache=True)
    cropped.crop(-7)
    model(text[:, :13], past_key_values=straight, use_cache=True)
    assert cropped.positions() == straight.positions() and cropped.get_seq_length() == 13
    for step in range(13, 30):
        one = model(text[:, step : step + 1], past_key_values=cropped, use_cache=True).logits
        two = model(text[:, step : step + 1], past_key_values=straight, use_cache=True).logits
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert cropped.positions() == straight.positions()


def test_what_a_cache_cannot_do_is_said():
    for build, named in (
        (lambda: PrunedCache().crop(-1), "cannot take tokens back"),
        (lambda: PrunedCache(reversible=True).crop(3), "as a negative number"),
        (lambda: PrunedCache(page=48), "page is 48"),
        (lambda: PrunedCache(max_live_tokens=0), "max_live_tokens is 0"),
    ):
        with pytest.raises(ctxprune.UserError, match=named):
            build()
