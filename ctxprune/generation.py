"""How does a retrofitted model write text? Step by step over a cache that holds only what survived."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune.cache import SHRINK_EVERY, PrunedCache
from ctxprune.errors import UserError
from ctxprune.retrofitting import mode, state_of


@dataclass(frozen=True)
class Generation:
    """tokens: the new tokens of each prompt, in the order of the prompts (end-of-sequence included when it was
    reached); live_tokens: mean over layers of the keys alive at the end of each row's last step, itself included;
    cache: the pruned cache as it was left, without the rows that ended early."""

    tokens: list[Int[Tensor, " _"]]
    live_tokens: list[float]
    cache: PrunedCache


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked: temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}: give 0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: give a number in (0, 1]")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: give 0 (off) or a positive number")


@torch.no_grad()
def generate(
    model,
    input_ids: Int[Tensor, "batch n"] | list[Int[Tensor, " _"]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | None = None,
    prefill_chunk: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Continue prompts with the dropped context physically gone.

    input_ids: a (batch, n) tensor or a list of 1-D prompts of any lengths (padded on the left inside). max_new_tokens:
    tokens added at most per row; a row ends at eos_token_id and leaves the batch. Each row samples with its own
    generator (seed + row), so its output never depends on its neighbours. prefill_chunk: prompt tokens per pass, 0 for
    all at once (prompts of one length only). on_token(step) is called after each step. Returns a Generation.

    Raises UserError for an empty prompt, max_new_tokens < 1, a prompt that with its continuation is longer than the
    model's positions, or sampling settings out of range.
    """
    picking = Sampling(temperature, top_k, top_p, seed)
    prompts = [row for row in input_ids]
    _check_prompts(model, prompts, max_new_tokens)
    device = next(model.parameters()).device
    ids, real = _left_padded(prompts, device)
    generators = [torch.Generator(device=device).manual_seed(seed + row) for row in range(len(prompts))]
    active = list(range(len(prompts)))
    tokens: list[list[int]] = [[] for _ in prompts]
    live = [0.0] * len(prompts)
    cache = PrunedCache()
    previous = state_of(model).mode
    was_training = model.training
    model.eval()
    try:
        with mode(model, previous if previous == "dense" else "hard"):
            logits = _prefill(model, cache, ids, real, prefill_chunk)
            position = real.sum(1)
            for step in range(max_new_tokens):
                chosen = pick(logits, picking, [generators[row] for row in active])
                for row, token in zip(active, chosen.tolist(), strict=True):
                    tokens[row].append(token)
                if on_token is not None:
                    on_token(step)
                going = torch.ones_like(chosen, dtype=torch.bool) if eos_token_id is None else chosen != eos_token_id
                if step + 1 == max_new_tokens or not bool(going.all()):
                    for row, count in zip(active, cache.live_tokens().double().mean(0).tolist(), strict=True):
                        live[row] = count
                if step + 1 == max_new_tokens or not bool(going.any()):
                    break
                if not bool(going.all()):
                    kept = going.nonzero().squeeze(1)
                    cache.select(kept)
                    active = [active[i] for i in kept.tolist()]
                    chosen, position = chosen[kept], position[kept]
                output = model(chosen[:, None], position_ids=position[:, None], past_key_values=cache, use_cache=True)
                logits, position = output.logits[:, -1], position + 1
                if (step + 1) % SHRINK_EVERY == 0:
                    cache.shrink()
    finally:
        model.train(was_training)
    return Generation([torch.tensor(row) for row in tokens], live, cache)


def pick(
    logits: Float[Tensor, "batch vocab"], how: Sampling, generators: list[torch.Generator]
) -> Int[Tensor, " batch"]:
    """The next token of each row."""
    if how.temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / how.temperature
    if 0 < how.top_k < scores.shape[-1]:
        smallest = scores.topk(how.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    if how.top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True)
        before = torch.softmax(ordered, -1).cumsum(-1) - torch.softmax(ordered, -1)
        # The likeliest token always stays; the one that crosses top_p stays as well.
        scores = scores.scatter(1, order, ordered.masked_fill(before >= how.top_p, -torch.inf))
    probability = torch.softmax(scores, -1)
    return torch.stack(
        [torch.multinomial(row, 1, generator=g)[0] for row, g in zip(probability, generators, strict=True)]
    )


def _prefill(model, cache: PrunedCache, ids: Tensor, real: Tensor, chunk: int) -> Float[Tensor, "batch vocab"]:
    """Run the prompts; logits after the last token of each."""
    position = (real.long().cumsum(1) - 1).clamp(min=0)
    padded = not bool(real.all())
    if chunk and padded:
        raise UserError("prefill_chunk needs prompts of one length: pass them one at a time or set it to 0")
    inputs = {"attention_mask": real.long() if padded else None, "past_key_values": cache, "use_cache": True}
    length = chunk or ids.shape[1]
    for start in range(0, ids.shape[1], length):
        part = slice(start, start + length)
        logits = model(ids[:, part], position_ids=position[:, part], logits_to_keep=1, **inputs).logits
    return logits[:, -1]


def _left_padded(prompts: list[Tensor], device) -> tuple[Int[Tensor, "batch n"], Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    real = torch.zeros(len(prompts), longest, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt.to(device)
        real[row, longest - len(prompt) :] = True
    return ids, real


def _check_prompts(model, prompts: list[Tensor], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: give at least 1")
    if not prompts or min(len(prompt) for prompt in prompts) == 0:
        raise UserError("the prompt is empty: give at least one token")
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(prompt) for prompt in prompts)
    if limit is not None and longest + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's {limit} positions: "
            "shorten the prompt or ask for fewer new tokens"
        )
    vocab = model.config.vocab_size
    if max(int(prompt.max()) for prompt in prompts) >= vocab or min(int(prompt.min()) for prompt in prompts) < 0:
        raise UserError(f"the prompt holds token ids outside the model's vocabulary of {vocab}: wrong tokenizer?")
