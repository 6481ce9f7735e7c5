"""Does what rows leave behind harm the next, and do layers of several sizes keep to one pool?"""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import ctxprune
from ctxprune import PrunedCache, UserError
from ctxprune.cache.layer_cache import LayerCache
from ctxprune.cache.page_pool import PoolFull
from tests.models import VOCAB, gated, small_model, tokens


def test_a_page_that_held_what_is_no_number_is_clean_for_the_next_row():
    """A path that multiplies what is not seen by 0 would make it one of its own."""
    layer = LayerCache(2, kv_heads=1, width=2, rank=3, page=16)
    layer.reserve(4)  # or the pool would shrink, and grow by new pages
    layer.give(torch.tensor([2, 1]))
    layer.pages.values[:3] = torch.nan
    layer.select(torch.tensor([1]))
    layer.give(torch.tensor([2]))
    mine = layer.pages.table[0, 1:3].long()
    assert layer.in_use == 3 and bool((layer.pages.values[mine] == 0).all())


def test_the_pages_of_a_layer_that_are_larger_than_the_first_ones_keep_to_the_pool():
    small, large = (LayerCache(1, kv_heads=1, width=width, rank=None, page=16) for width in (2, 64))
    limit = 2 * small.allocated_bytes() + 5 * large.page_bytes() + 9
    cache = PrunedCache(page=16, max_bytes=limit)
    cache.hold(small)
    cache.hold(large)
    with pytest.raises(PoolFull):
        for _ in range(20):
            large.give(torch.tensor([1]), exact=True)
    assert large.in_use == 5 and cache.allocated_bytes() <= limit


def test_assisted_decoding_does_not_go_with_an_alarm():
    cache = PrunedCache(alarm=ctxprune.Alarm(0.5))
    with pytest.raises(UserError, match="leave one of them out"):
        gated().generate(tokens(1, 12), past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=8)
    assert not cache.held


def test_layers_of_several_windows_do_not_hand_down_what_left_one_of_them():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 128}
    kinds = ["sliding_attention", "full_attention"]
    windows = {"use_sliding_window": True, "sliding_window": 7, "layer_types": kinds, "num_hidden_layers": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **ends, **windows)).eval()
    with pytest.raises(UserError, match="one sliding window"):
        ctxprune.retrofit(model, ctxprune.GateConfig(propagate_in_depth=True))
    ids = tokens(1, 40)
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)
    ctxprune.retrofit(model, ctxprune.GateConfig(beta=1e4))
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), wanted)


def test_dense_writing_hands_nothing_down(monkeypatch):
    """A gate that drops everything, in depth, bypassed."""
    handed, inherit = [], LayerCache.inherit
    monkeypatch.setattr(LayerCache, "inherit", lambda self, times: handed.append(1) or inherit(self, times))
    model = gated("mistral-sliding", propagate_in_depth=True, beta=-1e4)
    with ctxprune.mode(model, "dense"):
        written = ctxprune.generate(model, tokens(1, 20), max_new_tokens=12).tokens[0].tolist()
    assert written == small_model("mistral-sliding").generate(tokens(1, 20), max_new_tokens=12)[0, 20:].tolist()
    assert not handed
    ctxprune.generate(model, tokens(1, 20), max_new_tokens=2)
    assert handed
