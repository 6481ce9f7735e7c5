"""How fast does a pruned model decode, and how much does its cache hold? Pruned and dense in turn, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune.cache.pruned_cache import SHRINK_EVERY, PrunedCache
from ctxprune.retrofitting import mode

WARM_UP_TOKENS = 8


@dataclass
class Pass:
    """One timed decoding. seconds: of the decoding steps alone; the prompt's pass is `prefill_seconds`."""

    seconds: float
    prefill_seconds: float
    live_bytes: int
    allocated_bytes: int


def compare(
    model, ids: Int[Tensor, "batch n"], prompt: int, repeats: int, advance: Callable[[int], None]
) -> dict[str, object]:
    """Decode the same held-out text pruned and dense, repeats times in turn; medians, and the spread of the pruned
    rate.

    ids: the text; its first `prompt` tokens are the prompt, the others are fed one step at a time, each step computing
    the next token as in generation (fed text, not the model's own, so that both modes do the same work on the same
    context). The cache is measured at the last step, interaction keys included.
    """
    steps = ids.shape[1] - prompt
    passes: dict[str, list[Pass]] = {"hard": [], "dense": []}
    for name in passes:
        with mode(model, name):
            decode(model, ids[:, : prompt + min(WARM_UP_TOKENS, steps)], prompt)
    for repeat in range(repeats):
        for name, timed in passes.items():
            with mode(model, name):
                timed.append(decode(model, ids, prompt))
        advance(repeat + 1)
    rate = {name: [ids.shape[0] * steps / p.seconds for p in timed] for name, timed in passes.items()}
    pruned, dense = statistics.median(rate["hard"]), statistics.median(rate["dense"])
    return {
        "tokens_per_second": pruned,
        "tokens_per_second_spread": [min(rate["hard"]), max(rate["hard"])],
        "tokens_per_second_dense": dense,
        "tokens_per_second_dense_spread": [min(rate["dense"]), max(rate["dense"])],
        "ms_per_token": 1e3 * ids.shape[0] / pruned,
        "ms_per_token_dense": 1e3 * ids.shape[0] / dense,
        "prefill_seconds": statistics.median(p.prefill_seconds for p in passes["hard"]),
        "prefill_seconds_dense": statistics.median(p.prefill_seconds for p in passes["dense"]),
        "cache_bytes": passes["hard"][-1].live_bytes,
        "cache_bytes_allocated": passes["hard"][-1].allocated_bytes,
        "cache_bytes_dense": passes["dense"][-1].live_bytes,
    }


@torch.inference_mode()
def decode(model, ids: Int[Tensor, "batch n"], prompt: int) -> Pass:
    """Feed ids: the prompt in one pass, then a token per step, in the model's current mode (hard or dense)."""
    model.eval()
    cache, device = PrunedCache(), next(model.parameters()).device
    ids = ids.to(device)
    start = _now(device)
    logits = model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    logits[:, -1].argmax(-1)
    filled = _now(device)
    for step in range(prompt, ids.shape[1]):
        position = torch.full((ids.shape[0], 1), step, device=device)
        output = model(ids[:, step : step + 1], position_ids=position, past_key_values=cache, use_cache=True)
        output.logits[:, -1].argmax(-1)
        if (step - prompt + 1) % SHRINK_EVERY == 0:
            cache.shrink()
    return Pass(_now(device) - filled, filled - start, cache.live_bytes(), cache.allocated_bytes())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
