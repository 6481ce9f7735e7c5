"""Does the soft path train what it says, and does the model's own masking still hold?"""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import ctxprune
from ctxprune import GateConfig, UserError
from ctxprune.kernels.soft_attention import reference
from ctxprune.objective import kept_share, next_token_loss
from ctxprune.retrofitting import gate_parameters, set_alpha, state_of, wrappers
from tests.models import FAMILIES, GPT2, LAYERS, WINDOW, gated, open_gates, small_model, tokens


def soft_gradients(model, ids, **inputs) -> dict[str, torch.Tensor]:
    """Gradients of language loss plus kept share, in train mode."""
    model.train().zero_grad()
    logits = model(ids, use_cache=False, **inputs).logits
    (next_token_loss(logits[:, :-1], ids[:, 1:]) + 0.5 * kept_share(model)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_survival_of_the_first_layer_is_the_mean_of_i_over_the_visible_pairs():
    model, ids = gated(), tokens(2, 20)
    set_alpha(model, 2.0)
    position = torch.cat([torch.arange(8), torch.arange(12)]).expand(2, -1)
    model.train()(ids, position_ids=position)
    layer = model.model.layers[0]
    query, key, beta = wrappers(model)[0].rule.gate(layer.input_layernorm(model.model.embed_tokens(ids)))
    column = torch.arange(20)
    end, guard = torch.where(column < 8, 8, 20).expand(2, -1), (column + 1).expand(2, -1)
    survival = reference.survival(query, key, beta, 2.0, guard, end)
    pairs = 2 * (8 * 7 + 12 * 11) / 2
    assert state_of(model).survival[0].item() == pytest.approx(survival.tril(-1).sum().item() / pairs, rel=1e-5)
    assert kept_share(model).item() == pytest.approx(sum(s.item() for s in state_of(model).survival.values()) / LAYERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_soft_evaluation_is_hard_and_every_parameter_learns(family):
    model, ids = gated(family), tokens(2, 20)
    set_alpha(model, 1.1)
    with torch.no_grad():
        soft, hard = model.train()(ids).logits, model.eval()(ids).logits
        with ctxprune.mode(model, "soft"):
            assert torch.equal(model(ids).logits, soft)
        with ctxprune.mode(model.train(), "hard"):
            assert torch.equal(model(ids).logits, hard)
    assert not torch.allclose(soft, hard, atol=1e-3)
    gradients = soft_gradients(model, ids)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    gates = [name for name, p in model.named_parameters() if any(p is gate for gate in gate_parameters(model))]
    assert len(gates) == 3 * LAYERS and all(gradients[name].any() for name in gates)


@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_soft_gates_all_open_are_the_dense_model(family):
    model, ids = gated(family), tokens(2, 20)
    set_alpha(model, 2.0)
    open_gates(model)
    with torch.no_grad():
        soft = model.train()(ids).logits
        assert torch.allclose(soft, small_model(family)(ids).logits, atol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "hard", "soft"])
def test_the_models_sliding_window_holds_in_every_mode(mode):
    """One layer sees WINDOW tokens, three see at most 3 (WINDOW - 1) back: an earlier token has no influence."""
    model, ids = gated("mistral-sliding"), tokens(1, 40)
    open_gates(model)
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % 90
    reach = 5 + LAYERS * (WINDOW - 1)
    with torch.no_grad(), ctxprune.mode(model, mode):
        one, two = model(ids).logits[0], model(other).logits[0]
    assert torch.allclose(one[reach + 1 :], two[reach + 1 :], atol=1e-6)
    assert not torch.allclose(one[reach], two[reach], atol=1e-6)


@pytest.mark.parametrize("mode", ["hard", "soft"])
@torch.no_grad()
def test_packed_documents_never_see_each_other(mode):
    model, ids = gated(), tokens(1, 30)
    position = torch.cat([torch.arange(12), torch.arange(18)])[None]
    with ctxprune.mode(model, mode):
        packed = model(ids, position_ids=position).logits
        apart = torch.cat([model(ids[:, :12]).logits, model(ids[:, 12:]).logits], dim=1)
    assert torch.allclose(packed, apart, atol=1e-5)


def test_attention_dropout_is_refused():
    settings = {**GPT2, "attn_pdrop": 0.1}
    model = ctxprune.retrofit(tf.GPT2LMHeadModel(tf.GPT2Config(**settings)), GateConfig(rank=4)).train()
    with pytest.raises(UserError, match="dropout"):
        model(tokens(1, 8))


def test_a_cache_that_cannot_forget_is_refused():
    model, ids = gated(), tokens(1, 8)
    cache = tf.DynamicCache()
    with torch.no_grad(), pytest.raises(UserError, match="DynamicCache cannot forget"):
        model(ids, past_key_values=cache, use_cache=True)
        model(ids[:, :1], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("propagate", [False, True])
def test_activation_checkpointing_changes_no_gradient(propagate):
    ids = tokens(2, 20)
    plain, saving = (gated(propagate_in_depth=propagate) for _ in range(2))
    saving.activation_checkpointing_enable({"use_reentrant": False})
    set_alpha(plain, 2.0)
    set_alpha(saving, 2.0)
    passes = []
    wrappers(saving)[0].register_forward_pre_hook(lambda *_: passes.append(1))
    wanted, given = soft_gradients(plain, ids), soft_gradients(saving, ids)
    assert len(passes) == 2  # once more in the backward pass
    assert wanted.keys() == given.keys()
    for name in wanted:
        torch.testing.assert_close(given[name], wanted[name], rtol=1e-5, atol=1e-7, msg=name)


def test_what_is_computed_again_behind_the_penalty_is_not_recorded_again():
    """A checkpointed backward pass runs the last layer first: what the layer above dropped is not known there."""
    model = gated(propagate_in_depth=True).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    schedule = ctxprune.PruningSchedule(model, steps=8, sparsity=0.5)
    (model(tokens(2, 20), use_cache=False).logits.sum() + schedule.penalty()).backward()
    schedule.step()
    assert schedule.sparsity is not None


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_drops_propagated_in_depth_never_come_back(family):
    model, ids = gated(family, propagate_in_depth=True), tokens(2, 30)
    times = ctxprune.drop_times(model, ids).drop_time
    assert (times.diff(dim=0) <= 0).all() and (times.diff(dim=0) < 0).any()
    state_of(model).record = {}
    with torch.no_grad():
        model.train()(ids)
    beside_soft = state_of(model).recorded()
    assert (beside_soft.diff(dim=0) <= 0).all(), "what the controller watches is what is deployed"


def test_with_propagation_soft_survival_accumulates_and_reaches_the_first_gate():
    model, ids = gated(propagate_in_depth=True), tokens(2, 20)
    set_alpha(model, 2.0)
    model.train()(ids)
    survival = state_of(model).survival
    assert survival[0] > survival[1] > survival[2] > 0
    (last,) = torch.autograd.grad(survival[2], wrappers(model)[0].rule.gate.beta)
    assert last > 0
    model, apart = gated(), gated(propagate_in_depth=True)
    for candidate in (model, apart):
        set_alpha(candidate, 2.0)
        candidate.train()(ids)
    # The first layer knows nothing of depth: both agree there.
    assert state_of(model).survival[0].item() == pytest.approx(state_of(apart).survival[0].item(), rel=1e-5)
