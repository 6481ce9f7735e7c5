"""Does transformers' own generate forget, whatever it is asked for? Against the same call without any cache."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

import ctxprune
from ctxprune import PrunedCache, UserError, generate
from ctxprune.cache.layer_cache import LayerCache
from ctxprune.text.tokenizer import train_tokenizer
from tests.models import GROUPED, gated, small_model, tokens


def written(model, ids, **how) -> list[list[int]]:
    """By model.generate, in float64; no end of text."""
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=20, pad_token_id=0, **how)[:, ids.shape[1] :].tolist()


@pytest.fixture
def made(monkeypatch) -> list[PrunedCache]:
    """All pruned caches that are made."""
    caches, original = [], PrunedCache.__init__
    monkeypatch.setattr(PrunedCache, "__init__", lambda cache, **how: caches.append(cache) or original(cache, **how))
    return caches


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral-sliding", "gpt_neox", "opt"])
def test_greedy_is_ours(family, made):
    model, ids = gated(family).double(), tokens(2, 12)
    found = written(model, ids)
    assert len(made) == 1 and (made[0].live_tokens() < 31).any()
    assert found == written(model, ids, use_cache=False) and len(made) == 1
    assert found == [row.tolist() for row in generate(model, ids, max_new_tokens=20).tokens]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_padded_prompts_are_each_as_if_alone(family, made):
    model = gated(family).double()
    prompts = [tokens(1, n, seed=n)[0] for n in (3, 11, 7)]
    ids, mask = torch.zeros(2, 3, 11, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 11 - len(prompt) :], mask[row, 11 - len(prompt) :] = prompt, 1
    assert written(model, ids, attention_mask=mask) == [
        row.tolist() for row in generate(model, prompts, max_new_tokens=20).tokens
    ]


def test_sampling_draws_what_it_would_draw_without_a_cache(made):
    model, ids, found = gated().double(), tokens(2, 12), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        how = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9}
        found.append(written(model, ids, use_cache=use_cache, **how))
    assert found[0] == found[1] and len(made) == 1


@pytest.mark.parametrize("assistant", ["itself", "retrofitted", "original"])
def test_assisted_decoding_writes_the_same_text(assistant, made):
    """Drafts are taken back: keys that a refused draft dropped live again."""
    model, ids = gated().double(), tokens(1, 12)
    helpers = {"itself": model, "retrofitted": gated(seed=1).double(), "original": small_model(seed=1).double()}
    alone = written(model, ids)
    made.clear()
    assert written(model, ids, assistant_model=copy.deepcopy(helpers[assistant])) == alone
    assert all(cache.reversible for cache in made)


def test_twin_keys_that_stay_dropped_after_a_refused_draft_are_caught(monkeypatch):
    model, ids = gated().double(), tokens(1, 12)
    alone, original = written(model, ids), LayerCache.rewind
    assert written(model, ids, assistant_model=gated(seed=1).double()) == alone

    def forgetful(layer, length, end_of):
        original(layer, length, lambda position, row: torch.zeros_like(position))

    monkeypatch.setattr(LayerCache, "rewind", forgetful)
    assert written(model, ids, assistant_model=gated(seed=1).double()) != alone


def test_looking_up_the_prompt_writes_the_same_text():
    model, ids = gated().double(), tokens(1, 6).repeat(1, 4)
    assert written(model, ids, prompt_lookup_num_tokens=3) == written(model, ids)


@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_finds_what_it_finds_without_a_cache(beams, made):
    model, ids = gated().double(), tokens(2, 12)
    how = {"num_beams": beams, "num_return_sequences": 2}
    assert written(model, ids, **how) == written(model, ids, use_cache=False, **how)
    assert len(made) == 1 and made[0].batch_size == 2 * beams


def test_two_samples_of_one_prompt(made):
    model, ids, found = gated().double(), tokens(2, 12), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(written(model, ids, do_sample=True, num_return_sequences=3, use_cache=use_cache))
    assert found[0] == found[1] and len(found[0]) == 6


def test_a_cache_of_ones_own_is_used(made):
    model, ids = gated().double(), tokens(1, 40)
    cache = PrunedCache(max_live_tokens=9)
    written(model, ids, past_key_values=cache)
    assert len(made) == 1 and cache.live_tokens().max() <= 9


def test_a_cache_that_cannot_forget_is_refused():
    with pytest.raises(UserError, match="cache_implementation='static' cannot forget"):
        written(gated(), tokens(1, 5), cache_implementation="static")


def test_the_class_stays_what_it_says_and_copies():
    model = gated()
    assert type(model).__name__ == "LlamaForCausalLM" and isinstance(model, tf.LlamaForCausalLM)
    twin, ids = copy.deepcopy(model), tokens(1, 9)
    assert written(twin.double(), ids) == written(model.double(), ids)


def test_a_saved_model_serves_a_pipeline(tmp_path, made):
    """ctxprune.load and transformers.pipeline, end to end."""
    words = train_tokenizer(["once upon a time there was a fox and a goose", "the goose slept"] * 4, 300)
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**GROUPED, "vocab_size": len(words)})).double()
    ctxprune.save(ctxprune.retrofit(model, ctxprune.GateConfig(rank=4)), tmp_path / "model", words)
    model = ctxprune.load(tmp_path / "model")
    writer = tf.pipeline("text-generation", model=model, tokenizer=words, device="cpu")
    text = "once upon a time"
    answer = writer(text, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = words(text, return_tensors="pt").input_ids
    alone = generate(model, ids, max_new_tokens=8).tokens[0]
    assert len(made) >= 1 and answer == words.decode(alone, skip_special_tokens=True)
