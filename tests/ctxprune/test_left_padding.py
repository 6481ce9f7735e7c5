"""Does padding on the left change what a row forgets? Not where positions say so, nor where a model is given none."""

from __future__ import annotations

import pytest
import torch

import ctxprune
from ctxprune import UserError
from ctxprune.policies import Budget, H2OConfig, RandomConfig, SnapKVConfig, WindowConfig
from ctxprune.retrofitting import mode, state_of
from tests.models import LAYERS, small_model, tokens

PADDING, TEXT = 12, 20


def padded(row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.cat([row.new_zeros(1, PADDING), row], 1)
    real = torch.ones_like(ids)
    real[:, :PADDING] = 0
    return ids, real


@pytest.mark.parametrize(
    "policy",
    [
        SnapKVConfig(Budget(share=0.5), sinks=2, recent=2),
        H2OConfig(Budget(share=0.5), when="step", sinks=2, recent=2),
        WindowConfig((6,) * LAYERS, sinks=2),
    ],
    ids=lambda policy: policy.policy,
)
def test_whole_rows_forget_what_they_forget_alone(policy):
    model, row = ctxprune.retrofit(small_model(), policy).eval(), tokens(1, TEXT)
    ids, real = padded(row)
    alone = ctxprune.drop_times(model, row, prompt=torch.tensor([TEXT - 4])).drop_time
    end = torch.tensor([PADDING + TEXT - 4])
    together = ctxprune.drop_times(model, ids, attention_mask=real, prompt=end).drop_time[:, :, PADDING:]
    assert torch.equal(together - PADDING, alone)


def test_a_cache_that_would_take_padding_for_text_is_refused():
    model, row = ctxprune.retrofit(small_model(), SnapKVConfig(Budget(share=0.5), sinks=2, recent=2)), tokens(1, TEXT)
    model.eval()
    ids, real = padded(row)
    with pytest.raises(UserError, match="pass position_ids"):
        model(ids, attention_mask=real, past_key_values=ctxprune.PrunedCache())
    position = (real.cumsum(-1) - 1).clamp(min=0)
    said = model(ids, attention_mask=real, position_ids=position, past_key_values=ctxprune.PrunedCache()).logits
    alone = model(row, past_key_values=ctxprune.PrunedCache()).logits
    torch.testing.assert_close(said[:, PADDING:], alone, rtol=1e-4, atol=1e-5)


def test_a_prompt_that_is_kept_ends_where_it_ends_alone():
    policy = RandomConfig(Budget(share=0.4), when="step", keep_prompt=True, sinks=1, recent=1)
    model, row = ctxprune.retrofit(small_model(), policy).eval(), tokens(1, 40)
    ids, real = padded(row)
    position = (real.cumsum(-1) - 1).clamp(min=0)

    def dropped(row, before: int, **more) -> torch.Tensor:
        state = state_of(model)
        state.prompt, state.record = torch.tensor([before + 10]), {}
        try:
            with mode(model, "hard"), torch.no_grad():
                model(row, use_cache=False, **more)
            return state.recorded()[:, :, before:] - before
        finally:
            state.prompt = state.record = None

    alone, together = dropped(row, 0), dropped(ids, PADDING, attention_mask=real, position_ids=position)
    assert (alone < 40).any() and torch.equal(together, alone)
