"""Do policies that rank keys free memory while text is written, and say what they cannot do?"""

from __future__ import annotations

import pytest
import torch

import ctxprune
from ctxprune import Alarm, PrunedCache, UserError, generate, generate_lossless
from ctxprune.drop_time import forward_with_drop_times
from ctxprune.generation.batching import Batcher
from ctxprune.generation.prompts import page_bytes
from ctxprune.policies import H2OConfig, KeyNormConfig, RandomConfig, SnapKVConfig, TovaConfig
from ctxprune.policies.budget import Budget
from ctxprune.ranked_calls import Decisions
from ctxprune.retrofitting import state_of
from tests.models import LAYERS, small_model, tokens

POLICIES = {
    "at every step": TovaConfig(Budget(tokens=12), sinks=2, recent=3),
    "with statistics": H2OConfig(Budget(share=0.4), when="step", sinks=2, recent=3),
    "at the prompt's end": SnapKVConfig(Budget(share=0.4), sinks=2, recent=3, window=8),
    "head by head": H2OConfig(Budget(share=0.4, head_floor=0.2), apart=True, sinks=2, recent=3),
    "when a key comes": RandomConfig(Budget(threshold=0.3), when="step", apart=True, sinks=2, recent=3),
    "written keys only": RandomConfig(Budget(share=0.5), when="step", keep_prompt=True, sinks=2, recent=3),
}
each = pytest.mark.parametrize("config", POLICIES.values(), ids=POLICIES.keys())


def model_with(config):
    return ctxprune.retrofit(small_model(), config).double()


def prompts_of(*lengths: int) -> list[torch.Tensor]:
    return [tokens(1, n, seed=n)[0] for n in lengths]


@each
def test_requests_join_and_leave_and_each_is_as_if_alone(config):
    model, prompts = model_with(config), prompts_of(20, 44, 31, 9)
    together = generate(model, prompts, max_new_tokens=16, max_batch=3, prefill_chunk=16)
    for row, prompt in enumerate(prompts):
        assert together.tokens[row].tolist() == generate(model, [prompt], max_new_tokens=16).tokens[0].tolist()


@each
def test_who_has_to_wait_goes_on_as_if_nothing_had_been(config):
    """What a request had written is read again, but its prompt ends where it did."""
    model, prompts = model_with(config), prompts_of(40, 41, 42)
    pool = 7 * LAYERS * page_bytes(model, 16)
    batcher = Batcher(model, max_cache_bytes=pool, page=16)
    requests = [batcher.submit(prompt, max_new_tokens=50) for prompt in prompts]
    batcher.run()
    assert batcher.peak_cache_bytes <= pool
    written = [generate(model, [prompt], max_new_tokens=50).tokens[0].tolist() for prompt in prompts]
    assert [one.tokens for one in requests] == written
    # At most 12 keys a row never fill a pool of 7 pages a layer; who keeps prompts is not let in beside another.
    assert sum(one.pauses for one in requests) > 0 or config.budget.tokens == 12 or config.keep_prompt


@each
def test_greedy_text_is_that_of_whole_passes(config):
    model, prompt = model_with(config), tokens(1, 30)
    written = generate(model, [prompt[0]], max_new_tokens=10).tokens[0]
    text, end = prompt, torch.tensor([30])
    for token in written:
        _, logits = forward_with_drop_times(model, text, prompt=end)
        assert logits[0, -1].argmax() == token
        text = torch.cat([text, token.view(1, 1)], 1)


def test_the_cache_shrinks_to_the_budget_at_the_end_of_a_prompt():
    model = model_with(SnapKVConfig(Budget(share=0.25), sinks=2, recent=3, window=8))
    held = PrunedCache(page=16)
    with torch.no_grad():
        model(tokens(2, 128), past_key_values=held, use_cache=True)
    assert (held.live_tokens() == 32).all()
    assert all(layer.in_use == 2 * 2 and layer.queries is None for layer in held.held)
    assert held.live_bytes() == 2 * 32 * sum(layer.bytes_per_token() for layer in held.held)


def test_statistics_are_counted_as_memory():
    held = {}
    for name, config in {"plain": SnapKVConfig(when="step"), "with two numbers": H2OConfig(when="step")}.items():
        held[name] = PrunedCache(page=16)
        with torch.no_grad():
            model_with(config)(tokens(1, 20), past_key_values=held[name], use_cache=True)
    one, other = (held[name].held[0].bytes_per_token() for name in held)
    assert other == one + 2 * 8  # of float64
    # And the last 32 queries of 4 heads of 8 in every layer, where a scorer asks them.
    queries = 32 * 4 * 8 * 8
    assert [held[name].held[0].row_bytes() for name in held] == [queries, 0]
    keys = held["plain"].live_tokens().sum().item()
    assert held["plain"].live_bytes() == keys * one + LAYERS * queries
    assert other * 16 + 12 * 16 == page_bytes(model_with(H2OConfig(when="step")), 16)


def test_heads_that_decide_apart_keep_keys_of_their_own():
    model = model_with(KeyNormConfig(Budget(share=0.3), apart=True, sinks=1, recent=1))
    taken = ctxprune.drop_times(model, tokens(2, 40), prompt=torch.tensor([30, 30]))
    assert taken.drop_time.shape == (LAYERS, 2, 2, 40)
    assert (taken.drop_time[:, :, 0] != taken.drop_time[:, :, 1]).any()
    # 9 of 30 keys are left to 10 queries: the other 21 are the share that is dropped of these.
    dropped = 21 * 10 / (40 * 39 / 2)
    assert taken.sparsity() == pytest.approx(torch.full((LAYERS,), dropped, dtype=torch.float64))
    assert (taken.live_counts()[..., 30] == 9 + 1).all()


def test_transformers_generate_takes_its_first_pass_for_the_prompt():
    model, prompt = model_with(SnapKVConfig(Budget(share=0.4), sinks=2, recent=3, window=8)), tokens(2, 30)
    ours = generate(model, prompt, max_new_tokens=8).tokens
    theirs = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[:, 30:]
    assert torch.equal(torch.stack(ours), theirs)


def test_dense_mode_bypasses_the_ranking():
    model, ids = model_with(TovaConfig(Budget(tokens=13))), tokens(1, 40)
    with torch.no_grad():
        wanted = small_model().double()(ids).logits
        with ctxprune.mode(model, "dense"):
            assert torch.equal(model(ids).logits, wanted)
        assert not torch.equal(model(ids).logits, wanted)


def test_the_cost_of_deciding_is_counted():
    model = model_with(H2OConfig(when="step"))
    state_of(model).decisions = Decisions()
    generate(model, tokens(1, 20), max_new_tokens=5)
    assert state_of(model).decisions.calls == LAYERS * 5 and state_of(model).decisions.seconds > 0


@pytest.mark.parametrize(
    ("work", "named"),
    [
        (lambda model, ids: model(ids), "end of a prompt"),
        (lambda model, ids: ctxprune.drop_times(model, ids), "end of a prompt"),
        (lambda model, ids: generate(model, ids, alarm=Alarm()), "alarm"),
        (lambda model, ids: generate(model, ids, max_live_tokens=20), "budget of its own"),
        (lambda model, ids: generate_lossless(model, ids), "take tokens back"),
    ],
)
def test_what_a_ranking_cannot_do_is_refused_in_one_line(work, named):
    model = model_with(SnapKVConfig(Budget(share=0.4), sinks=2, recent=3))
    with pytest.raises(UserError, match=named) as caught, torch.no_grad():
        work(model, tokens(1, 20))
    assert "\n" not in str(caught.value)
