"""Does a budget keep as many as it says, the best ones, and say no in one line?"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxprune import UserError
from ctxprune.policies import FrequencyConfig, H2OConfig, RandomConfig, SnapKVConfig, TovaConfig, from_dict
from ctxprune.policies.budget import Budget, chosen
from ctxprune.policies.scorer import attention, hashed


def kept(
    budget: Budget, score, *, protected=(), missing=(), length=None, layer=0, layers=1, dtype=torch.float64
) -> list[list[int]]:
    """Keys that stay of one sequence, per head."""
    score = torch.tensor([score], dtype=dtype)
    candidate, safe = torch.ones_like(score, dtype=torch.bool), torch.zeros_like(score, dtype=torch.bool)
    candidate[..., list(missing)], safe[..., list(protected)] = False, True
    length = torch.tensor([length or score.shape[-1] - len(missing)])
    stays = chosen(budget, score, candidate, safe & candidate, length, layer, layers)
    return [row.nonzero().squeeze(1).tolist() for row in stays[0]]


def test_the_highest_scores_stay_and_of_equal_ones_the_younger():
    assert kept(Budget(tokens=2), [[5, 1, 9, 3]]) == [[0, 2]]
    assert kept(Budget(tokens=2), [[1, 1, 1, 1]]) == [[2, 3]]


def test_protected_keys_count_and_stay_even_beyond_the_budget():
    assert kept(Budget(tokens=2), [[1, 9, 8, 7]], protected=[0]) == [[0, 1]]
    assert kept(Budget(tokens=1), [[1, 9, 8, 7]], protected=[0, 3]) == [[0, 3]]


def test_missing_keys_are_never_kept():
    assert kept(Budget(tokens=3), [[9, 9, 1, 2]], missing=[0, 1]) == [[2, 3]]


@given(st.integers(1, 500), st.floats(0.001, 1.0))
def test_a_share_is_rounded_up_and_never_nothing(length, share):
    count = int(Budget(share=share).count(torch.tensor([length]), 0, 1))
    assert 1 <= count <= length and count >= share * length - 1e-3 and (count == 1 or count - 1 < share * length + 1e-3)


def test_a_tenth_of_thirty_is_three():
    assert int(Budget(share=0.1).count(torch.tensor([30]), 0, 1)) == 3


def test_a_pyramid_keeps_its_mean_and_falls_with_depth():
    budget = Budget(tokens=100, pyramid=0.6)
    counts = [int(budget.count(torch.tensor([1000]), layer, 5)) for layer in range(5)]
    assert counts == [160, 130, 100, 70, 40]
    # 75 % more than 80 of 100 keys are not there: what the first layer cannot take stays with the last one.
    assert [int(Budget(share=0.8, pyramid=0.75).count(torch.tensor([100]), layer, 2)) for layer in (0, 1)] == [100, 60]


@settings(deadline=None)
@given(
    st.one_of(
        st.floats(0.01, 1.0).map(lambda share: {"share": share}), st.integers(1, 80).map(lambda n: {"tokens": n})
    ),
    st.floats(-0.99, 0.99),
    st.integers(1, 9),
    st.integers(1, 300),
)
def test_layers_keep_together_what_they_would_keep_alike(amount, slope, layers, length):
    tokens = torch.tensor([length])
    mean = int(Budget(**amount).count(tokens, 0, layers))
    counts = [int(Budget(**amount, pyramid=slope).count(tokens, layer, layers)) for layer in range(layers)]
    assert sum(counts) == layers * mean and all(1 <= count <= length for count in counts)
    falling = counts if slope >= 0 else counts[::-1]
    assert falling == sorted(falling, reverse=True)


def test_heads_share_what_is_not_theirs_for_sure():
    score = [[0.9, 0.8, 0.7, 0.6], [0.5, 0.1, 0.1, 0.1]]
    assert kept(Budget(tokens=2), score) == [[0, 1], [0, 3]]
    assert kept(Budget(tokens=2, head_floor=0.5), score) == [[0, 1, 2], [0]]


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.floats(0.0, 1.0), st.integers(0, 5), st.integers(0, 10**6))
def test_heads_keep_together_what_they_would_keep_alike(tokens, heads, floor, protected, seed):
    score = torch.rand(heads, 6, generator=torch.Generator().manual_seed(seed)).tolist()
    rows = kept(Budget(tokens=tokens, head_floor=floor), score, protected=range(protected))
    assert sum(map(len, rows)) == heads * max(tokens, protected)
    assert all(set(range(protected)) <= set(row) and row for row in rows)


def test_mass_keeps_the_fewest_keys_that_hold_it():
    assert kept(Budget(mass=0.7), [[0.5, 0.1, 0.3, 0.1]]) == [[0, 2]]
    assert kept(Budget(mass=0.8), [[0.5, 0.1, 0.3, 0.1]]) == [[0, 2]]
    assert kept(Budget(mass=0.81), [[0.5, 0.1, 0.3, 0.1]]) == [[0, 2, 3]]
    assert kept(Budget(mass=1.0), [[0.5, 0.1, 0.3, 0.1]]) == [[0, 1, 2, 3]]


def test_more_threshold_keeps_less_but_never_nothing():
    score = [[0.5, 0.1, 0.3, 0.2]]
    assert [kept(Budget(threshold=t), score) for t in (0.1, 0.25, 9.0)] == [[[0, 1, 2, 3]], [[0, 2]], [[0]]]


def test_lots_depend_on_position_and_seed_alone():
    place = torch.arange(10_000)
    drawn = hashed(place, 3)
    assert torch.equal(drawn[500:600], hashed(place[500:600], 3)) and not torch.equal(drawn, hashed(place, 4))
    # Uniform: the largest distance of the empirical distribution, at 1 in 1000.
    assert (drawn.sort().values - (place + 0.5) / 10_000).abs().max() < 1.95 / 100
    assert abs(torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1]) < 0.04


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Budget(), "one of tokens, share"),
        (lambda: Budget(tokens=3, share=0.5), "one of tokens, share"),
        (lambda: Budget(tokens=0), "tokens is 0"),
        (lambda: Budget(share=0.0), "share is 0.0"),
        (lambda: Budget(share=1.5), "share is 1.5"),
        (lambda: Budget(mass=float("nan")), "mass is nan"),
        (lambda: Budget(threshold=float("inf")), "threshold is inf"),
        (lambda: Budget(share=0.5, pyramid=1.0), "pyramid is 1.0"),
        (lambda: Budget(mass=0.5, pyramid=0.5), "pyramid"),
        (lambda: Budget(share=0.5, head_floor=-0.1), "head_floor is -0.1"),
        (lambda: Budget(threshold=0.5, head_floor=0.2), "head_floor"),
        (lambda: H2OConfig(when="later"), "when='later'"),
        (lambda: H2OConfig(sinks=-1), "sinks=-1"),
        (lambda: H2OConfig(Budget(mass=0.5), when="step"), "when=prompt"),
        (lambda: H2OConfig(Budget(tokens=12)), "no room"),
        (lambda: H2OConfig(Budget(share=0.5, head_floor=0.2)), "apart=true"),
        (lambda: RandomConfig(keep_prompt=True), "keep_prompt"),
        (lambda: SnapKVConfig(pool=4), "pool=4"),
        (lambda: SnapKVConfig(window=0), "window=0"),
        (lambda: from_dict({"policy": "h20"}), "nearest: h2o"),
        (lambda: from_dict({"policy": "tova", "window": 3}), "no setting 'window'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(make, named):
    with pytest.raises(UserError, match=named) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_settings_stand_with_their_policy():
    assert TovaConfig().when == "step" and FrequencyConfig(counts=(1, 2)).counts == (1, 2)


def test_scores_of_eight_bits_are_summed_and_compared_in_more():
    """A sum of 1,000 scores stops growing in bfloat16, and softmax gives neighbouring keys the same probability."""
    score = torch.rand(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    everything = kept(Budget(mass=1.0), score[None].tolist(), dtype=torch.bfloat16)
    assert len(everything[0]) > 995, "785 where they are summed in bfloat16"
    query, key = (torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (1, 500))
    said = attention(query, key, torch.ones(1, 1, 1, 500, dtype=torch.bool), 8**-0.5)
    assert said.dtype == torch.float32 and said[0, 0].unique().numel() > said.bfloat16()[0, 0].unique().numel()


def test_lots_of_any_seed_are_drawn():
    position = torch.arange(64)
    draws = [hashed(position, seed) for seed in (0, 1, 2**62, 2**63 - 1)]
    assert all(((draw >= 0) & (draw < 1)).all() for draw in draws)
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
