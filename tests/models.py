"""Which small models do the tests share? Three layers, width 32, untrained but sharp, with gates that really drop."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as tf
from torch import Tensor

import ctxprune
from ctxprune.drop_time import forward_with_drop_times
from ctxprune.retrofitting import wrappers
from ctxprune.tasks.recall import RecallConfig

VOCAB = 97
LAYERS = 3
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = {**COMMON, "intermediate_size": 64, "num_key_value_heads": 2}
GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
WINDOW = 7
"""Tokens the Mistral with a sliding window sees, itself included."""
TASK = RecallConfig(length=24, facts=3, decoys=1, keys=8, values=8, fillers=8)
"""What `recaller` is asked."""

FAMILIES: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, head_dim=8)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=None)),
    "mistral-sliding": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=WINDOW)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**COMMON, intermediate_size=64)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**GROUPED)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**GROUPED)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**GROUPED, head_dim=8)),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**COMMON, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0)),
}


def small_model(family: str = "llama", seed: int = 0) -> tf.PreTrainedModel:
    """An untrained model of the family in eval mode, its weights three times the usual so that attention is uneven."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def recaller(config) -> tf.PreTrainedModel:
    """An untrained model of two layers with the vocabulary of TASK, under this policy."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return ctxprune.retrofit(tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=TASK.vocab_size, **sizes, **ends)), config)


def gated(family: str = "llama", *, std: float = 0.3, beta: float = 3.0, seed: int = 0, **config) -> tf.PreTrainedModel:
    """A small model retrofitted with rank-4 gates that drop some tokens and keep others."""
    model = ctxprune.retrofit(small_model(family, seed), ctxprune.GateConfig(rank=4, beta=beta, **config))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for wrapper in wrappers(model):
            for linear in (wrapper.rule.gate.query, wrapper.rule.gate.key):
                # Unit-length inputs where the norm is near one, so that every family drops a similar share.
                linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * std)
    return model


def open_gates(model) -> None:
    """Every gate says keep, whatever it reads."""
    with torch.no_grad():
        for wrapper in wrappers(model):
            wrapper.rule.gate.query.weight.zero_()
            wrapper.rule.gate.beta.fill_(1.0)


def tokens(batch: int, n: int, seed: int = 0) -> Tensor:
    """(batch, n) random token ids."""
    return torch.randint(0, VOCAB, (batch, n), generator=torch.Generator().manual_seed(seed + 100))


@torch.no_grad()
def decode(model, ids: Tensor, chunks: list[int], *, positions: bool = True):
    """Feed ids (batch, n) through one pruned cache in pieces. Yields (tokens fed, cache, logits of the piece)."""
    cache, fed = ctxprune.PrunedCache(), 0
    for length in chunks:
        inputs = {}
        if positions:
            inputs["position_ids"] = torch.arange(fed, fed + length)[None].expand(ids.shape[0], -1)
        logits = model(ids[:, fed : fed + length], past_key_values=cache, use_cache=True, **inputs).logits
        fed += length
        yield fed, cache, logits


def disagreement(model, ids: Tensor, chunks: list[int], *, positions: bool = True) -> tuple[int, float]:
    """Decoding in pieces against one pass over whole rows: (kept sets that differ, largest difference of a logit)."""
    taken, whole = forward_with_drop_times(model, ids)
    wrong, worst = 0, 0.0
    for fed, cache, logits in decode(model, ids, chunks, positions=positions):
        worst = max(worst, (logits - whole[:, fed - logits.shape[1] : fed]).abs().max().item())
        for layer, held_here in enumerate(cache.positions()):
            for row, held in enumerate(held_here):
                wanted = [j for j in range(fed) if taken.drop_time[layer, row, j] >= fed]
                wrong += held != wanted
    return wrong, worst
