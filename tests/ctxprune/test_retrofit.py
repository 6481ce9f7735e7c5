"""Does a retrofit leave the model bit for bit what it was until something is dropped, and refuse what it cannot
wrap?"""

from __future__ import annotations

import pickle

import pytest
import torch
import transformers as tf

import ctxprune
from ctxprune import GateConfig, UserError
from ctxprune.retrofitting import (
    freeze_backbone,
    gate_parameters,
    mode,
    parameter_counts,
    set_alpha,
    state_of,
    wrappers,
)
from tests.models import FAMILIES, GPT2, GROUPED, LAYERS, VOCAB, gated, open_gates, small_model, tokens


def with_head(weight):
    """A Llama whose head has other weights."""
    model = small_model("llama")
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


REFUSED = {
    "llama": (lambda: with_head(torch.zeros(VOCAB, 32, dtype=torch.int8)), "weights are quantised"),
    "llama.": (lambda: with_head(torch.zeros(VOCAB, 32, device="meta")), "on cpu, meta; load it on one device"),
    "bloom": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
        "attention interface",
    ),
    "gemma2": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED, head_dim=8)), "caps its attention logits"),
    "gpt_oss": (
        lambda: tf.GptOssForCausalLM(
            tf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
        ),
        "learned sink logits",
    ),
    "mamba": (
        lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2)),
        "attention interface",
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        ),
        "has an encoder",
    ),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, reorder_and_upcast_attn=True)), "reorder_and_upcast"),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_stay_bit_identical_while_nothing_is_dropped(family):
    ids, original = tokens(2, 40), small_model(family)
    before = original(ids).logits
    model = gated(family)
    hard = model(ids).logits
    assert not torch.equal(hard, before)
    with ctxprune.mode(model, "dense"):
        assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, hard)
    open_gates(model)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_on_the_left_changes_no_real_token(family):
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :6] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    before = small_model(family)(ids, attention_mask=mask, position_ids=position).logits
    model = gated(family)
    with ctxprune.mode(model, "dense"):
        dense = model(ids, attention_mask=mask, position_ids=position).logits
    assert torch.allclose(dense[mask.bool()], before[mask.bool()], atol=1e-5)
    padded = model(ids, attention_mask=mask, position_ids=position).logits
    alone = model(ids[:1, 6:]).logits
    assert torch.allclose(padded[0, 6:], alone[0], atol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_wrapped_is_refused_in_one_line_that_names_the_family(family):
    build, reason = REFUSED[family]
    model = build()
    with pytest.raises(UserError, match=f"'{family.rstrip('.')}'.*{reason}") as caught:
        ctxprune.retrofit(model, GateConfig(rank=4))
    assert "\n" not in str(caught.value)
    assert not wrappers(model)


def test_a_model_that_is_not_of_transformers_is_refused():
    with pytest.raises(UserError, match="Linear is not a transformers model"):
        ctxprune.retrofit(torch.nn.Linear(2, 2), GateConfig())


def test_a_second_retrofit_is_refused():
    with pytest.raises(UserError, match="already retrofitted"):
        ctxprune.retrofit(gated(), GateConfig(rank=4))


@pytest.mark.parametrize("call", [state_of, lambda m: ctxprune.generate(m, tokens(1, 3)), freeze_backbone])
def test_a_model_without_retrofit_is_refused(call):
    with pytest.raises(UserError):
        call(small_model())


def test_own_weights_are_untouched_and_counted_apart_from_the_gates():
    original = small_model()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    model = ctxprune.retrofit(original, GateConfig(rank=4))
    after = {
        name.replace(".inner.", "."): tensor for name, tensor in model.state_dict().items() if ".rule." not in name
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    counts = parameter_counts(model)
    assert counts["gates"] == sum(p.numel() for p in gate_parameters(model)) == LAYERS * (2 * 32 * 4 + 1)
    assert counts["backbone"] == sum(p.numel() for p in small_model().parameters())


def test_layers_are_wrapped_in_order_and_share_one_state():
    found = wrappers(gated())
    assert [wrapper.layer_idx for wrapper in found] == list(range(LAYERS))
    assert len({id(wrapper.state) for wrapper in found}) == 1


def test_a_mode_that_does_not_exist_is_refused_not_taken_for_another():
    model = gated()
    with pytest.raises(UserError, match="choose one of auto, soft, hard, dense"), mode(model, "Dense"):
        pass
    assert state_of(model).mode == "auto"


def test_a_retrofitted_model_is_pickled_whole():
    model, ids = gated().eval(), tokens(1, 12)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(ctxprune.drop_times(again, ids).drop_time, ctxprune.drop_times(model, ids).drop_time)
    assert state_of(again) is not state_of(model) and again.pruning_state is state_of(again)
    assert torch.equal(again.generate(ids, max_new_tokens=5), model.generate(ids, max_new_tokens=5))


def test_gates_take_the_models_precision():
    model = ctxprune.retrofit(small_model().to(torch.bfloat16), GateConfig(rank=4))
    assert {p.dtype for p in gate_parameters(model)} == {torch.bfloat16}


def test_a_frozen_backbone_leaves_only_gates_to_train():
    model = gated()
    freeze_backbone(model)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in gate_parameters(model)}
    with pytest.raises(UserError, match="nothing to train"):
        freeze_backbone(ctxprune.retrofit(small_model(), ctxprune.WindowConfig((4,) * LAYERS)))


def test_mode_returns_to_what_it_was_even_after_an_error():
    model = gated()
    with pytest.raises(RuntimeError), ctxprune.mode(model, "dense"):
        raise RuntimeError
    assert state_of(model).mode == "auto"


@pytest.mark.parametrize("alpha", [0.9, 16.1, float("nan")])
def test_an_alpha_out_of_range_is_refused(alpha):
    model = gated()
    with pytest.raises(UserError, match="from 1 to 16"):
        set_alpha(model, alpha)
    assert state_of(model).alpha == 8.0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_the_step_function_does_not_depend_on_alpha(family):
    model, ids = gated(family), tokens(1, 30)
    before = model(ids).logits
    set_alpha(model, 1.5)
    assert torch.equal(model(ids).logits, before)
