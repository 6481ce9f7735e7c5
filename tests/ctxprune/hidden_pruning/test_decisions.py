"""Is the right token dropped, and does a model with its hidden states pruned still train, write and refuse?"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

import ctxprune
from ctxprune.errors import UserError
from tests.hidden_reference import (
    BERT,
    CONFIGS,
    LENGTHS,
    HiddenPruningConfig,
    dense,
    hidden_stream,
    inputs,
    masked,
    model_of,
    prune_hidden,
    pruned,
    pruning_of,
    said,
)
from tests.models import COMMON, GROUPED, LAYERS, small_model, tokens

DECODERS = ("llama", "gpt2", "mistral", "gpt_neox", "opt")


def expected(family: str, last: int, share: float, lengths: list[int]) -> list[set[int]]:
    """Columns that enter the second layer, from the full attention probabilities of the first."""
    model, batch = model_of(family), inputs(family, lengths)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions[0].mean(1)
    chosen = []
    for row, length in enumerate(lengths):
        columns = batch["attention_mask"][row].nonzero()[:, 0].tolist()
        asked = columns[-last:] if family in DECODERS else columns
        importance = {}
        for key in columns:
            observers = [query for query in asked if family not in DECODERS or query >= key]
            importance[key] = float(sum(weights[row, query, key] for query in observers)) / max(1, len(observers))
        protected = [columns[0], columns[-1]]
        ranked = sorted(set(columns) - set(protected), key=lambda key: -importance[key])
        chosen.append({*protected, *ranked[: max(0, -int(-share * length // 1) - 2)]})
    return chosen


@pytest.mark.parametrize("family, last", [("llama", 4), ("gpt2", 4), ("bert-words", 0)])
def test_the_most_attended_tokens_stay(family, last):
    config = HiddenPruningConfig(keep=(1.0, 0.5, 0.5), last=last)
    model = prune_hidden(model_of(family), config)
    said(model, family, inputs(family, LENGTHS))
    found = [set(row.nonzero()[:, 0].tolist()) for row in pruning_of(model).stats.kept[1]]
    assert found == expected(family, last, 0.5, LENGTHS)


def test_an_encoder_asks_the_first_row_and_others_evenly_spread():
    alive = torch.tensor([[True] * 10, [True] * 3 + [False] * 7])
    slots, exist = hidden_stream.asked_rows(alive, 4, causal=False)
    assert slots.tolist()[0] == [0, 2, 5, 7] and exist.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert slots.tolist()[1][:3] == [0, 1, 2]
    slots, exist = hidden_stream.asked_rows(alive.flip(1), 4, causal=True)
    assert slots.tolist()[0] == [6, 7, 8, 9] and slots.tolist()[1][:3] == [7, 8, 9]
    assert hidden_stream.asked_rows(alive, 0, causal=True)[0].tolist()[0] == list(range(10))


def test_asking_in_blocks_changes_nothing(monkeypatch):
    said(one := pruned("llama", "attention, all asked"), "llama", batch := inputs("llama", LENGTHS))
    monkeypatch.setattr(hidden_stream, "BLOCK", 3)
    said(other := pruned("llama", "attention, all asked"), "llama", batch)
    assert torch.equal(pruning_of(one).stats.kept, pruning_of(other).stats.kept)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert-words", "bert-text"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_with_tokens_leaving(family, checkpointing):
    """The gradients of the reference, for every parameter, through gathered states."""
    batch, model = inputs(family, LENGTHS), pruned(family).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    kept = []
    for _ in range(2):
        model.zero_grad()
        said(model, family, batch, grad=True).square().sum().backward()
        kept.append(pruning_of(model).stats.kept)
    assert torch.equal(*kept)
    reference = masked(family, kept[0]).train()
    said(reference, family, batch, grad=True).square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, wanted[name], rtol=1e-9, atol=1e-12 * largest), name


@torch.no_grad()
def written(model, batch: dict, steps: int) -> tuple[torch.Tensor, torch.Tensor, tf.DynamicCache]:
    """Greedy decoding over the cache of a pruned prompt: (batch, steps) tokens, their logits, the cache."""
    cache, mask, position = tf.DynamicCache(), batch["attention_mask"], batch["position_ids"]
    found = model(**batch, past_key_values=cache, use_cache=True).logits[:, -1]
    said, written = [found], []
    for _ in range(steps):
        written.append(said[-1].argmax(-1, keepdim=True))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        position = position[:, -1:] + 1
        step = {"attention_mask": mask, "position_ids": position, "past_key_values": cache, "use_cache": True}
        said.append(model(written[-1], **step).logits[:, -1])
    return torch.cat(written, 1), torch.stack(said, 1), cache


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("lengths", [[19] * 4, [19, 7, 12]], ids=["even", "padded"])
@pytest.mark.parametrize("name", ["attention", "threshold"])
def test_decoding_sees_in_each_layer_what_entered_it(family, lengths, name):
    batch, model, steps = inputs(family, lengths), pruned(family, name), 4
    new, logits, cache = written(model, batch, steps)
    kept = pruning_of(model).stats.kept
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [
        int(kept[layer].sum(1).max()) + steps for layer in range(LAYERS)
    ]
    ones = torch.ones(LAYERS, *new.shape, dtype=torch.bool)
    whole = {
        "input_ids": torch.cat([batch["input_ids"], new], 1),
        "attention_mask": torch.cat([batch["attention_mask"], ones[0].long()], 1),
    }
    whole["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = masked(family, torch.cat([kept, ones], 2))(**whole, use_cache=False).logits[:, -steps - 1 :]
    assert float((logits - wanted).abs().max()) < 1e-12 * float(wanted.abs().max())


def test_generate_writes_over_what_was_kept():
    model, batch = pruned("llama"), inputs("llama", [19, 7, 12])
    wanted, _, _ = written(model, batch, 5)
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    del batch["position_ids"]
    assert torch.equal(model.generate(**batch, **asked)[:, -5:], wanted)
    beams = model.generate(**batch, **asked, num_beams=3)
    assert beams.shape == (3, 24)


def test_chunks_after_the_prompt_see_what_steps_do():
    model, batch = pruned("llama"), inputs("llama", [19, 19])
    new, logits, _ = written(model, batch, 4)
    cache = tf.DynamicCache()
    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True)
        position = torch.arange(19, 23).expand(2, -1)
        chunk = model(new, position_ids=position, past_key_values=cache, use_cache=True).logits
    assert torch.allclose(chunk, logits[:, 1:], atol=1e-12)


@pytest.mark.parametrize("fixed", [False, True])
@torch.no_grad()
def test_a_cache_that_was_filled_densely_stays_dense(fixed):
    model, batch = pruned("llama"), inputs("llama", [14, 14])
    cache = tf.StaticCache(model.config, max_cache_len=20) if fixed else tf.DynamicCache()
    with dense(model):
        model(**batch, past_key_values=cache, use_cache=True)
    step = {"position_ids": torch.full((2, 1), 14), "past_key_values": cache, "use_cache": True}
    found = model(tokens(2, 1), **step).logits
    whole = torch.cat([batch["input_ids"], tokens(2, 1)], 1)
    assert torch.allclose(found[:, -1], model_of("llama")(whole).logits[:, -1], atol=1e-12)


def config_of(**more):
    return lambda: HiddenPruningConfig(**{"keep": (1.0, 0.5, 0.5), **more})


def pruned_family(make):
    return lambda: prune_hidden(make(), CONFIGS["attention"])


def read(**given):
    return lambda: pruned("llama")(tokens(2, 9), **given)


def decode(spoil):
    def run():
        model, batch = pruned("llama"), inputs("llama", [14, 14])
        _, _, cache = written(model, batch, 1)
        model(tokens(2, 1), past_key_values=spoil(cache), use_cache=True)

    return run


def cut(cache):
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :4], layer.values[:, :, :4]
    return cache


def swapped(cache):
    cache.reorder_cache(torch.tensor([1, 0]))
    return cache


def told(config, **given):
    """A family whose layers are told of positions in a form of its own."""
    return lambda: prune_hidden(small(config), CONFIGS["attention"])(**given)


def told_deeper():
    model = pruned("llama")
    more = {"biases": torch.zeros(2, 9)}
    model.model.layers[1].register_forward_pre_hook(lambda layer, given, named: (given, named | more), with_kwargs=True)
    model(tokens(2, 9))


def small(config):
    config._attn_implementation = "sdpa"
    return tf.AutoModel.from_config(config).double().eval()


def other_attention():
    model = pruned("llama")
    model.set_attn_implementation("eager")
    model(tokens(2, 9))


def eager():
    model = small_model("llama")
    model.set_attn_implementation("eager")
    return model


def sliding():
    pruned("mistral-sliding").generate(tokens(2, 14), max_new_tokens=2, pad_token_id=1)


T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
ALBERT = {**BERT, "embedding_size": 32}
CROSS = {**BERT, "is_decoder": True, "add_cross_attention": True}
OPT = {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.1}
LATENT = {**COMMON, "kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
LATENT |= {"v_head_dim": 8, "intermediate_size": 64, "first_k_dense_replace": 3}
VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "intermediate_size": 64}
PIXELS = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
REFUSALS = {
    "neither share nor threshold": (config_of(keep=()), "one of keep and threshold"),
    "both": (config_of(threshold=(0.0,)), "one of keep and threshold"),
    "a share of none": (config_of(keep=(1.0, 0.0)), "above 0"),
    "a share above all": (config_of(keep=(1.0, 1.2)), "at most 1"),
    "does not begin with all": (config_of(keep=(0.9, 0.5)), "begin with 1.0"),
    "comes back": (config_of(keep=(1.0, 0.5, 0.6)), "never rise"),
    "threshold before the first layer": (config_of(keep=(), threshold=(0.1, 0.2)), "give 0"),
    "threshold that is no number": (config_of(keep=(), threshold=(0.0, float("nan"))), "finite"),
    "unknown score": (config_of(score="luck"), "attention, norm, random"),
    "negative rows": (config_of(last=-1), "last is -1"),
    "negative protection": (config_of(protect_first=-2), "protect_first is -2"),
    "layers that do not match": (
        lambda: prune_hidden(small_model(), HiddenPruningConfig(keep=(1.0, 0.5))),
        "2 entries, the model 3 layers",
    ),
    "twice": (lambda: prune_hidden(pruned("llama"), CONFIGS["norm"]), "release_hidden"),
    "not pruned": (lambda: pruning_of(small_model()), "prune_hidden"),
    "no model of transformers": (pruned_family(lambda: torch.nn.Linear(2, 2)), "Linear"),
    "retrofitted": (pruned_family(lambda: ctxprune.retrofit(small_model(), ctxprune.DenseConfig())), "'llama'.*retrof"),
    "eager": (pruned_family(eager), "'llama'.*sdpa"),
    "encoder and decoder": (pruned_family(lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5))), "'t5'.*encoder"),
    "one layer for all": (pruned_family(lambda: tf.AlbertModel(tf.AlbertConfig(**ALBERT))), "'albert'.*one list"),
    "cross-attention": (pruned_family(lambda: tf.BertLMHeadModel(tf.BertConfig(**CROSS))), "'bert'.*one attention"),
    "capped logits": (
        pruned_family(lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED, head_dim=8))),
        "'gemma2'.*caps",
    ),
    "layerdrop": (
        pruned_family(
            lambda: tf.OPTForCausalLM(tf.OPTConfig(**COMMON, ffn_dim=64, word_embed_proj_dim=32, layerdrop=0.1))
        ),
        "layerdrop",
    ),
    "attention changed later": (other_attention, "became 'eager'"),
    "a cache of fixed size": (
        read(past_key_values=tf.StaticCache(tf.LlamaConfig(**GROUPED), max_cache_len=32), use_cache=True),
        "StaticCache",
    ),
    "whose is it": (read(biases=torch.zeros(2, 9)), "biases"),
    "whose is it, in a deeper layer": (told_deeper, "biases"),
    "a copied cache": (decode(copy.deepcopy), "original"),
    "a cache that was cut": (decode(cut), "fill it again"),
    "rows that changed places": (decode(swapped), "changed places"),
    "a sliding window": (sliding, "sliding"),
    "positions of one number": (told(tf.DeepseekV2Config(**LATENT), input_ids=tokens(2, 9)), "position_embeddings"),
    "positions of patches only": (told(tf.DINOv3ViTConfig(**VIT), pixel_values=PIXELS), "position_embeddings"),
}


@pytest.mark.parametrize("run, says", REFUSALS.values(), ids=REFUSALS.keys())
def test_refused_in_one_line(run, says):
    with pytest.raises(UserError, match=says) as refused:
        run()
    assert "\n" not in str(refused.value)
