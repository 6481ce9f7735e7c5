"""Can a model serve this request? Asked before any work."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.retrofitting import wrappers


def check_prompt(model, prompt: Int[Tensor, " n"], max_new_tokens: int) -> None:
    """Raises UserError for what is no row of token ids, an empty prompt, ids outside the vocabulary,
    max_new_tokens < 1, and more tokens than the model has positions."""
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: give at least 1")
    if not isinstance(prompt, Tensor) or prompt.ndim != 1 or prompt.is_floating_point():
        raise UserError("a prompt is a 1-D tensor of token ids: give a list of them, or a tensor (batch, n)")
    if len(prompt) == 0:
        raise UserError("the prompt is empty: give at least one token")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and len(prompt) + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} exceed the model's {limit} positions"
            ": shorten the prompt or ask for fewer new tokens"
        )
    vocab = model.config.vocab_size
    if int(prompt.max()) >= vocab or int(prompt.min()) < 0:
        raise UserError(f"the prompt holds token ids outside the model's vocabulary of {vocab}: wrong tokenizer?")


def page_bytes(model, page: int) -> int:
    """Bytes of one layer's page of `page` slots: keys, values, interaction keys, what a ranking keeps beside them, and
    three integers per slot."""
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    first = wrappers(model)[0]
    gate = None if first.mode == "dense" else first.rule.gate
    rank = 0 if gate is None else gate.query.weight.shape[0]
    size = next(model.parameters()).element_size()
    ranking, rows, marks = first.ranking, 1, 0
    if ranking is not None:
        # A page is of one row, and where heads decide apart each of them is a row.
        rows = kv_heads if ranking.config.apart else 1
        marks = 2 * max(4, size) if ranking.marks else 0
    return rows * page * ((2 * kv_heads // rows * width + rank) * size + marks + 3 * 4)
