"""How are prompts read? In chunks, so that what is held at once follows what survives and not the prompt."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ctxprune.cache.pinning import stacked
from ctxprune.cache.pruned_cache import PrunedCache
from ctxprune.generation.request import Request


def read(model, cache: PrunedCache, group: list[Request], chunk: int) -> Float[Tensor, "batch vocab"]:
    """Read the texts of these requests as prefill does. What one had written before it had to wait is not part of its
    prompt."""
    cache.pinned = stacked([one.pinned for one in group])
    return prefill(model, cache, [one.text() for one in group], chunk, [len(one.prompt) for one in group])


def prefill(
    model, cache: PrunedCache, prompts: list[Tensor], chunk: int, ends: list[int] | None = None
) -> Float[Tensor, "batch vocab"]:
    """Read prompts of any lengths, `chunk` tokens per pass (0: all at once), padded on the left: logits after the last
    token of each. ends: where each prompt is over, if what is read goes on behind it."""
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    real = torch.zeros(len(prompts), longest, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt.to(device)
        real[row, longest - len(prompt) :] = True
    cache.prompt = torch.tensor(ends or [len(prompt) for prompt in prompts], device=device)
    position = (real.long().cumsum(1) - 1).clamp(min=0)
    mask = None if bool(real.all()) else real.long()
    # The short pass comes first: the later ones, over what the cache holds, are all of one length.
    ends = [longest] if chunk == 0 else list(range(longest, 0, -chunk))[::-1]
    for start, end in pairwise([0, *ends]):
        inputs = {"attention_mask": None if mask is None else mask[:, :end], "past_key_values": cache}
        part = slice(start, end)
        logits = model(ids[:, part], position_ids=position[:, part], logits_to_keep=1, use_cache=True, **inputs).logits
        cache.shrink()
    return logits[:, -1]
