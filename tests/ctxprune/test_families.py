"""Which families of transformers can forget, and what of theirs must not get lost?"""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import ctxprune
from ctxprune import DenseConfig, GateConfig, UserError
from ctxprune.checkpoint import load_base
from ctxprune.drop_time import drop_times
from tests.models import GPT2, GROUPED, LAYERS, gated, tokens

KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
CODE = {**GPT2, "multi_query": True}


def exaone4():
    """Writes its window on every attention, those of full layers too."""
    return tf.Exaone4ForCausalLM(tf.Exaone4Config(**GROUPED, sliding_window=6, layer_types=KINDS))


def gemma3():
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=6, layer_types=KINDS))


def qwen3():
    settings = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, head_dim=8, **settings))


def jetmoe():
    """Its attention returns three things."""
    settings = {"num_local_experts": 2, "num_experts_per_tok": 1, "kv_channels": 8}
    return tf.JetMoeForCausalLM(tf.JetMoeConfig(**GROUPED, **settings))


def bigcode():
    return tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**CODE))


@pytest.mark.parametrize("make", [exaone4, gemma3, qwen3, jetmoe, bigcode], ids=lambda make: make.__name__)
def test_nothing_dropped_is_the_model_itself(make):
    torch.manual_seed(0)
    model, ids = make().double().eval(), tokens(2, 20)
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        found = ctxprune.retrofit(model, DenseConfig())(ids, use_cache=False).logits
    assert (found - wanted).abs().max() < 1e-10


def diffllama():
    return tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**GROUPED))


def llama4():
    settings = {"num_local_experts": 2, "attention_chunk_size": 8, "head_dim": 8, "intermediate_size_mlp": 64}
    return tf.Llama4ForCausalLM(tf.Llama4TextConfig(**GROUPED, **settings))


def gemma3n():
    settings = {"head_dim": 8, "layer_types": ["full_attention"] * LAYERS, "num_kv_shared_layers": 1}
    settings |= {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    return tf.Gemma3nForCausalLM(
        tf.Gemma3nTextConfig(**GROUPED, activation_sparsity_pattern=[0.0] * LAYERS, **settings)
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (diffllama, "it calls its attention twice per layer"),
        (llama4, "it has layers of chunked_attention"),
        (gemma3n, "some of its layers use the keys of others"),
    ],
)
def test_what_would_be_another_model_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        ctxprune.retrofit(make(), DenseConfig())


def test_masks_that_a_model_learns_or_a_person_brings_are_refused():
    doge = ctxprune.retrofit(tf.DogeForCausalLM(tf.DogeConfig(**GROUPED)), DenseConfig())
    with pytest.raises(UserError, match="masks of one's own are not read"):
        doge(tokens(1, 9))
    with pytest.raises(UserError, match="masks of one's own are not read"):
        gated()(tokens(1, 9), attention_mask=torch.zeros(1, 1, 9, 9), use_cache=False)


def test_packed_documents_stay_apart_where_layers_are_not_told_their_positions():
    torch.manual_seed(0)
    model = ctxprune.retrofit(bigcode().double().eval(), DenseConfig())
    one, other = tokens(1, 8), tokens(1, 6, seed=1)
    position = torch.cat([torch.arange(8), torch.arange(6)])[None]
    with torch.no_grad():
        packed = model(torch.cat([one, other], 1), position_ids=position, use_cache=False).logits[:, 8:]
        alone = model(other, use_cache=False).logits
    assert torch.allclose(packed, alone, atol=1e-12)
    assert (drop_times(model, torch.cat([one, other], 1), position_ids=position).drop_time[..., :8] == 8).all()


def test_dropout_of_every_name_is_off(tmp_path):
    config = tf.BioGptConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    tf.BioGptForCausalLM(config).save_pretrained(tmp_path)
    model = ctxprune.retrofit(load_base(str(tmp_path), 32), GateConfig(rank=4)).train()
    model(tokens(1, 20), use_cache=False).logits.sum().backward()
