"""Is what follows a context the same whether it is read at once or replayed, and does a bias do what it says?"""

from __future__ import annotations

import pytest
import torch

import ctxprune
from ctxprune import UserError
from ctxprune.drop_time import forward_with_drop_times
from ctxprune.given_scores import given
from ctxprune.policies import DenseConfig, GivenConfig
from ctxprune.policies.budget import Budget
from ctxprune.replay import read, resume
from ctxprune.retrofitting import wrappers
from ctxprune.teachers.soft_mask import received
from tests.models import LAYERS, gated, small_model, tokens

CONTEXT, N = 20, 28
FAMILIES = ["llama", "gpt2", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_tokens_say_what_one_pass_says(family):
    model = ctxprune.retrofit(small_model(family), DenseConfig()).double()
    ids = tokens(3, N)
    context = read(model, ids[:, :CONTEXT])
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits[:, CONTEXT:]
        found = resume(model, context, ids[:, CONTEXT:], [None] * LAYERS)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert len(context.hidden) == context.layers == LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hidden_key_is_a_dropped_key(family):
    """The scores of the policy `given` say who goes; minus infinity on the same keys must say the same."""
    model = ctxprune.retrofit(small_model(family), GivenConfig(Budget(tokens=9), sinks=0, recent=0)).double()
    ids, end = tokens(3, N), torch.full((3,), CONTEXT)
    scores = torch.rand(LAYERS, 3, CONTEXT, generator=torch.Generator().manual_seed(0))
    with given(model, scores):
        taken, logits = forward_with_drop_times(model, ids, prompt=end)
    hidden = taken.drop_time[..., :CONTEXT] <= CONTEXT
    assert (hidden.sum(-1) == CONTEXT - 9).all()
    bias = [torch.zeros(3, 1, 1, CONTEXT).masked_fill(gone[:, None, None], -torch.inf) for gone in hidden]
    with torch.no_grad():
        found = resume(model, read(model, ids[:, :CONTEXT]), ids[:, CONTEXT:], bias)
    assert torch.allclose(found, logits[:, CONTEXT:], atol=1e-12)


def test_rows_may_follow_any_context_and_gates_stay_out_of_it():
    model, ids = gated("llama").double(), tokens(3, N)
    context, row = read(model, ids[:, :CONTEXT]), torch.tensor([2, 0, 2, 1])
    with torch.no_grad():
        found = resume(model, context, ids[row, CONTEXT:], [None] * LAYERS, row)
        with ctxprune.mode(model, "dense"):
            wanted = model(ids[row], use_cache=False).logits[:, CONTEXT:]
    assert torch.allclose(found, wanted, atol=1e-12)


def test_a_context_knows_the_scale_of_its_attention():
    """Some families (Granite) have one of their own; what keys received is computed with it."""
    model, ids = ctxprune.retrofit(small_model(), DenseConfig()).double(), tokens(2, N)
    plain = small_model().double()
    plain.set_attn_implementation("eager")
    for wrapper, layer in zip(wrappers(model), plain.model.layers, strict=True):
        wrapper.inner.scaling = layer.self_attn.scaling = 0.05
    context = read(model, ids)
    with torch.no_grad():
        shares = plain(ids, output_attentions=True).attentions
    for layer in range(LAYERS):
        observers = torch.arange(N, 0, -1)
        assert torch.allclose(received(context, layer), shares[layer].mean(1).sum(1) / observers, atol=1e-12)


def test_a_bias_has_the_gradient_of_a_finite_difference():
    # GPT-2: the norms of a Llama are computed in float32 whatever its weights are.
    model, ids = ctxprune.retrofit(small_model("gpt2"), DenseConfig()).double(), tokens(1, N)
    context = read(model, ids[:, :CONTEXT])

    def said(leaf: torch.Tensor) -> torch.Tensor:
        return resume(model, context, ids[:, CONTEXT:], [leaf, *[None] * (LAYERS - 1)])[0, -1, :5].sum()

    leaf = torch.zeros(1, 4, N - CONTEXT, CONTEXT, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(said(leaf), leaf)
    with torch.no_grad():
        for place in [(0, 1, 7, 3), (0, 3, 7, 19), (0, 0, 2, 0)]:
            moved = torch.zeros_like(leaf)
            moved[place] = 1e-6
            assert gradient[place] == pytest.approx(((said(moved) - said(-moved)) / 2e-6).item(), rel=1e-4, abs=1e-8)


def test_a_model_is_itself_again_afterwards():
    model, ids = ctxprune.retrofit(small_model(), DenseConfig()), tokens(1, N)
    with torch.no_grad():
        before = model(ids).logits
        context = read(model, ids[:, :CONTEXT])
        with pytest.raises(IndexError):
            resume(model, context, ids[:, CONTEXT:], [])
        assert torch.equal(model(ids).logits, before)


def test_scores_are_handed_over_for_the_batch_and_layers_at_hand():
    model = ctxprune.retrofit(small_model(), GivenConfig())
    end = torch.tensor([10])
    with pytest.raises(UserError, match="handed over"):
        ctxprune.drop_times(model, tokens(1, 12), prompt=end)
    with pytest.raises(UserError, match="of 2 layers, the model has 3"), given(model, torch.zeros(2, 1, 10)):
        pass
    with given(model, torch.zeros(3, 2, 10)), pytest.raises(UserError, match="those of 2 rows"):
        ctxprune.drop_times(model, tokens(1, 12), prompt=end)
    with pytest.raises(UserError, match="policy given"), given(gated(), torch.zeros(3, 1, 10)):
        pass


def test_contexts_longer_than_a_models_own_window_are_refused():
    """Replayed tokens see the whole context, which such a model does not."""
    model = ctxprune.retrofit(small_model(), DenseConfig())
    wrappers(model)[1].window = CONTEXT - 1
    with pytest.raises(UserError, match=f"sees {CONTEXT - 1} tokens"):
        read(model, tokens(1, CONTEXT))
    context = read(model, tokens(1, CONTEXT - 2))
    resume(model, context, tokens(1, 1), [None] * LAYERS)
    with pytest.raises(UserError, match=f"sees {CONTEXT - 1} tokens, and there are {CONTEXT}"):
        resume(model, context, tokens(1, 2), [None] * LAYERS)
