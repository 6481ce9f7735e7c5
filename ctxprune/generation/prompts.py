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
    own, more = numbers_per_key(model)
    size = next(model.parameters()).element_size()
    ranking, rows, marks = wrappers(model)[0].ranking, 1, 0
    if ranking is not None:
        # A page is of one row, and where heads decide apart each of them is a row.
        rows = _kv_heads(model) if ranking.config.apart else 1
        marks = 2 * max(4, size) if ranking.marks else 0
    return rows * page * ((own // rows + more) * size + marks + 3 * 4)


def numbers_per_key(model) -> tuple[int, int]:
    """Numbers that a layer keeps of a token: of its keys and values together, and of its interaction key beside them
    (0 without gates)."""
    config, first = model.config, wrappers(model)[0]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    gate = None if first.mode == "dense" else first.rule.gate
    return 2 * _kv_heads(model) * width, 0 if gate is None else gate.query.weight.shape[0]


def _kv_heads(model) -> int:
    return getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
