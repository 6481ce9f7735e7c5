"""How does a retrofitted model write text? Step by step over a cache that holds only what survived."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune.cache.revival import Alarm
from ctxprune.errors import UserError
from ctxprune.generation.batching import Batcher
from ctxprune.generation.prompts import check_prompt
from ctxprune.generation.request import EndOfText
from ctxprune.generation.sampling import Sampling


@dataclass(frozen=True)
class Generation:
    """tokens: the new tokens of each prompt, in the order of the prompts (end-of-sequence included when it was
    reached); live_tokens: mean over layers of the keys alive at each row's last step, the newest included;
    peak_cache_bytes: of all pages held at once, while prompts are read too, and with those that an alarm keeps."""

    tokens: list[Int[Tensor, " _"]]
    live_tokens: list[float]
    peak_cache_bytes: int


def generate(
    model,
    input_ids: Int[Tensor, "batch n"] | list[Int[Tensor, " _"]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: EndOfText = None,
    pinned: Sequence[tuple[int, int]] = (),
    max_live_tokens: int | None = None,
    max_cache_bytes: int | None = None,
    max_batch: int = 64,
    prefill_chunk: int = 512,
    alarm: Alarm | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Generation:
    """Continue prompts with the dropped context physically gone.

    input_ids: a (batch, n) tensor or a list of 1-D prompts of any lengths. max_new_tokens: tokens added at most per
    row; a row ends at eos_token_id (one, or any of several; None: at none, not even the model's own) and leaves the
    batch, and prompts beyond max_batch or max_cache_bytes join as others leave. Each row samples with its own generator
    (seed + row), so its output never depends on its neighbours.
    pinned: spans of positions [start, end) that are never dropped, in every prompt. max_live_tokens: keys that a row
    may hold per layer; beyond it go those that the policy ranks lowest. prefill_chunk: prompt tokens per pass, 0 for
    whole prompts; any chunk gives the same result. alarm: an Alarm brings dropped keys back where a query may need
    them (approximate; it keeps what was dropped). on_token(row, token) is called for each token as it is written.

    Raises UserError for an empty prompt, max_new_tokens < 1, a prompt that with its continuation is longer than the
    model's positions, sampling settings out of range, or a pool too small for one sequence.
    """
    prompts = [row for row in input_ids]
    if not prompts:
        raise UserError("the prompt is empty: give at least one token")
    for prompt in prompts:
        check_prompt(model, prompt, max_new_tokens)
    batcher = Batcher(
        model,
        max_batch=max_batch,
        max_cache_bytes=max_cache_bytes,
        max_live_tokens=max_live_tokens,
        prefill_chunk=prefill_chunk,
        alarm=alarm,
    )
    requests = [
        batcher.submit(
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, seed + row),
            eos_token_id=eos_token_id,
            pinned=spans(pinned, len(prompt) + max_new_tokens),
            on_token=on_token,
        )
        for row, prompt in enumerate(prompts)
    ]
    batcher.run()
    tokens = [torch.tensor(one.tokens) for one in requests]
    return Generation(tokens, [one.live_tokens for one in requests], batcher.peak_cache_bytes)


def spans(pinned: Sequence[tuple[int, int]], length: int) -> Tensor | None:
    """(length,) True at the positions of these spans [start, end); None without any. Raises UserError for an empty or
    negative span."""
    if not pinned:
        return None
    chosen = torch.zeros(length, dtype=torch.bool)
    for start, end in pinned:
        if not 0 <= start < end:
            raise UserError(f"pinned span ({start}, {end}): give 0 <= start < end")
        chosen[start:end] = True
    return chosen
