"""Do static patterns keep the positions that their papers draw, whatever the text?"""

from __future__ import annotations

import pytest
import torch

import ctxprune
from ctxprune.drop_time import drop_times
from ctxprune.errors import UserError
from ctxprune.policies.bigbird import BigBirdConfig
from ctxprune.policies.budget import Budget
from ctxprune.policies.strided_keys import StridedKeysConfig
from tests.models import LAYERS, small_model, tokens

N = 64


def kept(config, seed: int = 0, n: int = N) -> list[list[int]]:
    """Positions of a prompt that stay, per layer; the two rows of a batch must agree."""
    model = ctxprune.retrofit(small_model("llama"), config)
    times = drop_times(model, tokens(2, n + 1, seed=seed), prompt=torch.full((2,), n)).drop_time
    stays = times[:, :, :n] > n
    assert torch.equal(stays[:, 0], stays[:, 1])
    return [layer.nonzero().squeeze(1).tolist() for layer in stays[:, 0]]


def bigbird(tokens: int, **settings) -> BigBirdConfig:
    return BigBirdConfig(Budget(tokens=tokens), sinks=0, recent=0, block=4, **settings)


@pytest.mark.parametrize("every", [1, 2, 4, 8])
def test_of_a_share_every_so_many_th_key_stays(every):
    config = StridedKeysConfig(Budget(share=1 / every), sinks=0, recent=0)
    assert kept(config) == [list(range(every - 1, N, every))] * LAYERS


@pytest.mark.parametrize("tokens", range(8, N))
def test_between_strides_the_longest_gap_is_that_of_the_wider_one(tokens):
    (positions, *_) = kept(StridedKeysConfig(Budget(tokens=tokens), sinks=0, recent=0))
    wider = 2 ** (N // tokens).bit_length()
    assert len(positions) == tokens
    assert max(b - a for a, b in zip([-1, *positions], [*positions, N], strict=True)) <= wider


def test_bigbird_is_two_parts_front_three_window_three_drawn_blocks():
    layers = kept(bigbird(16))
    for positions in layers:
        assert len(positions) == 16 and set(range(4)) <= set(positions) and set(range(N - 6, N)) <= set(positions)
        drawn = [position for position in positions if 4 <= position < N - 6]
        # Whole blocks, but for one that the budget cuts and one that the window met.
        whole = [block for block in range(N // 4) if set(range(4 * block, 4 * block + 4)) <= set(drawn)]
        assert len(drawn) <= 6 and len({position // 4 for position in drawn}) <= 2 and len(whole) <= 1
    assert len({tuple(positions) for positions in layers}) > 1
    assert layers == kept(bigbird(16), seed=5) and layers != kept(bigbird(16, seed=1))


def test_without_drawn_blocks_it_is_longformer():
    assert kept(bigbird(16, first=1, window=3, drawn=0)) == [[*range(4), *range(N - 12, N)]] * LAYERS


def test_blocks_are_drawn_from_all_of_the_context_and_no_more():
    (positions, *_) = kept(bigbird(32, first=0, window=0, drawn=1))
    blocks = {position // 4 for position in positions}
    assert len(blocks) == 8 and min(blocks) < 4 and max(blocks) >= 12


@pytest.mark.parametrize(
    "settings", [{"first": -1}, {"block": 0}, {"first": 0, "window": 0, "drawn": 0}], ids=lambda fields: str(fields)
)
def test_parts_that_make_no_pattern_are_refused(settings):
    with pytest.raises(UserError, match="give parts of 0 or more") as caught:
        BigBirdConfig(**settings)
    assert "\n" not in str(caught.value)
