"""Which model does a job train? A from-scratch base, or a pretrained one retrofitted with its policy."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import ctxprune
from ctxprune import checkpoint
from ctxprune.budget import refuse_out_of_reach, share_for, strided_for, window_for
from ctxprune.errors import UserError
from ctxprune.policies import POLICIES, PolicyConfig
from ctxprune.text.batches import train_batch
from ctxprune.text.token_store import TokenStore
from ctxprune.visibility import layout
from pipelines.config import Config, ModelConfig
from pipelines.ranges import RANKED

CALIBRATION_SEED = 0xCA1B
"""Seed of the training windows on which budgets are settled; apart from the seeds of training."""
CALIBRATION_TOKENS, CALIBRATION_ROWS = 65536, 16
"""Training tokens on which budgets are settled, and windows of a batch of them."""


def from_scratch(model: ModelConfig, vocab_size: int, start_id: int, context: int, seed: int) -> PreTrainedModel:
    """A randomly initialised model of a family that can be retrofitted, with `context` positions."""
    torch.manual_seed(seed)
    common = {"vocab_size": vocab_size, "bos_token_id": start_id, "eos_token_id": start_id}
    if model.family == "gpt2":
        sizes = {"n_layer": model.layers, "n_embd": model.width, "n_head": model.heads, "n_positions": context}
        sizes |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    else:
        sizes = {
            "num_hidden_layers": model.layers,
            "hidden_size": model.width,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            # The usual 8/3 of gated MLPs, rounded up to a multiple of 32.
            "intermediate_size": -(-8 * model.width // 96) * 32,
            "max_position_embeddings": context,
            "tie_word_embeddings": True,
        }
    if model.family == "qwen3":
        sizes["head_dim"] = model.width // model.heads
    config = AutoConfig.for_model(model.family, **common, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pretrained(folder_or_id: str, context: int, tokens: TokenStore) -> PreTrainedModel:
    """A base model whose vocabulary holds every token of the corpus."""
    model = checkpoint.load_base(folder_or_id, context)
    if tokens.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokens.vocab_size} entries, {folder_or_id} only {model.config.vocab_size}: "
            "they do not belong together; give the model's own tokenizer"
        )
    return model


def refuse_long(model, tokens: int, asked: str) -> None:
    """UserError where `asked`, so many tokens, is more than the model has positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UserError(f"{asked} is {tokens}, more than the model's {positions} positions: lower it")


def policy_for(config: Config, layers: int, tokens: TokenStore) -> PolicyConfig:
    """The policy of a trial; window and strided ones are solved for the target on training text. UserError for a target
    that protected tokens put out of reach."""
    pruning, keep = config.pruning, {"sinks": config.policy.sinks, "recent": config.policy.recent}
    if pruning.policy == "dense":
        return ctxprune.DenseConfig(**keep)
    position = torch.cat([batch.position_ids for batch in calibration(config, tokens)])
    documents = layout(position.shape, position, None, position.device)
    if pruning.policy == "learned":
        if pruning.sparsity is not None:
            refuse_out_of_reach(pruning.sparsity, documents, **keep)
        return ctxprune.GateConfig(
            rank=pruning.rank, beta=pruning.beta, propagate_in_depth=pruning.propagate_in_depth, **keep
        )
    if pruning.policy in RANKED:
        return POLICIES[pruning.policy](when="step", budget=share_for(pruning.sparsity, documents, **keep), **keep)
    solve = window_for if pruning.policy == "window" else strided_for
    return solve(pruning.sparsity, documents, layers, **keep)


def calibration(config: Config, tokens: TokenStore) -> list:
    """Windows of training text, in batches, on which budgets are settled: the same for every trial."""
    rows, context = CALIBRATION_ROWS, config.train.context
    count = max(1, CALIBRATION_TOKENS // (rows * context))
    return [train_batch(tokens.train, CALIBRATION_SEED, step, 0, 1, rows, context) for step in range(count)]
