"""Does what stands behind a prompt change what it keeps? Padding to the right of a row, or the next packed document."""

from __future__ import annotations

import pytest
import torch

import ctxprune
from ctxprune import PrunedCache, UserError
from ctxprune.policies import POLICIES, RankedConfig
from ctxprune.policies.budget import Budget
from tests.models import small_model, tokens

N, LENGTHS = 26, (20, 26, 11)
# Not what has its scores of one batch.
RANKED = [name for name, config in POLICIES.items() if issubclass(config, RankedConfig) and name != "given"]


def kept(model, ids: torch.Tensor, mask: torch.Tensor, lengths: list[int]) -> list[list[list[int]]]:
    """Positions that each layer and row holds when prompts of these lengths have been read."""
    held = PrunedCache(page=16)
    held.prompt = torch.tensor(lengths)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=position, past_key_values=held, use_cache=True)
    return held.positions()


def ranking(name: str) -> RankedConfig:
    """This policy with a budget that holds where the prompt ends, of a kind that it takes."""
    for budget in (Budget(share=0.4), Budget(threshold=0.0)):
        for when in ({"when": "prompt"}, {}):
            try:
                return POLICIES[name](budget=budget, sinks=1, recent=1, **when)
            except UserError:
                continue
    raise AssertionError(name)


@pytest.mark.parametrize("name", RANKED)
def test_padding_to_the_right_changes_nothing(name):
    model = ctxprune.retrofit(small_model("llama"), ranking(name)).double()
    ids, mask, alone = torch.zeros(3, N, dtype=torch.long), torch.zeros(3, N, dtype=torch.long), []
    for row, length in enumerate(LENGTHS):
        text = tokens(1, length, seed=row)
        ids[row, :length], mask[row, :length] = text, 1
        alone.append(kept(model, text, torch.ones_like(text), [length]))
    for layer, together in enumerate(kept(model, ids, mask, list(LENGTHS))):
        # A row of the cache, or one for each of its KV heads.
        assert together == [row for found in alone for row in found[layer]]
