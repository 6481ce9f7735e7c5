"""Does each rule drop what it says, and nothing it must not?"""

from __future__ import annotations

import json

import pytest
import torch

import ctxprune
from ctxprune import DenseConfig, GateConfig, StridedConfig, UserError, WindowConfig
from ctxprune.policies import BY_POSITION, from_dict, to_dict
from ctxprune.policies.frequency import ContextScorer
from ctxprune.policies.hidden_scorer import HiddenScorer
from ctxprune.policies.key_norm import KeyNormScorer
from ctxprune.policies.keydiff import KeyDiffScorer
from ctxprune.policies.scorer import Arrivals, Signals, attention
from ctxprune.policies.snapkv import SnapKVScorer
from ctxprune.retrofitting import wrappers
from tests.models import LAYERS, disagreement, gated, small_model, tokens

EXAMPLES = [
    DenseConfig(),
    GateConfig(rank=4, beta=1.5, sinks=1, recent=2),
    WindowConfig((5, 6, 7), sinks=2),
    StridedConfig((4, 4, 5), (1, 2, 1), recent=1),
]


def dropped(config, n: int = 10, **inputs) -> torch.Tensor:
    """Drop times of a small model under the policy: (layers, n)."""
    model = ctxprune.retrofit(small_model(), config)
    return ctxprune.drop_times(model, tokens(1, n), **inputs).drop_time[:, 0].clamp(max=n)


def test_a_window_of_three_is_seen_by_three_queries():
    times = dropped(WindowConfig((1, 3, 20)), 6)
    assert times.tolist() == [[1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 6, 6], [6] * 6]


def test_a_window_starts_anew_with_each_packed_document():
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    times = dropped(WindowConfig((3,) * LAYERS), 7, position_ids=position)
    assert times[0].tolist() == [3, 4, 4, 4, 7, 7, 7]


def test_a_strided_pattern_keeps_its_block_and_the_last_token_of_every_earlier_one():
    times = dropped(StridedConfig((3, 4, 3), (1, 1, 2)), 10)
    assert times[0].tolist() == [3, 3, 10, 6, 6, 10, 9, 9, 10, 10]
    assert times[1].tolist() == [4, 4, 4, 10, 8, 8, 8, 10, 10, 10]
    assert times[2].tolist() == [3, 3, 3, 6, 6, 10, 9, 9, 9, 10]


def test_dense_drops_nothing():
    assert dropped(DenseConfig(), 10).unique().tolist() == [10]


def test_the_most_closed_gates_leave_sinks_and_recent_tokens():
    model = gated(beta=-1e4, sinks=2, recent=3)
    times = ctxprune.drop_times(model, tokens(2, 10)).drop_time.clamp(max=10)
    assert times.unique(dim=0).tolist() == [[[10, 10, 6, 7, 8, 9, 10, 10, 10, 10]] * 2]


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda config: config.policy)
def test_decoding_step_by_step_keeps_the_same_tokens(config):
    model = ctxprune.retrofit(small_model(), config).double()
    for chunks in ([6] + [1] * 18, [5, 7, 1, 11]):
        wrong, worst = disagreement(model, tokens(2, 24), chunks)
        assert wrong == 0 and worst < 1e-10


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda config: config.policy)
def test_protected_tokens_outlive_every_rule(config):
    protected = type(config)(**{**to_dict_fields(config), "sinks": 2, "recent": 3})
    model = ctxprune.retrofit(small_model(), protected)
    for wrapper in wrappers(model):
        if wrapper.rule.gate is not None:
            wrapper.rule.gate.beta.data.fill_(-1e4)
    times = ctxprune.drop_times(model, tokens(1, 12)).drop_time[:, 0]
    column = torch.arange(12)
    assert (times[:, :2] >= 12).all() and (times >= torch.minimum(column + 4, torch.tensor(12))).all()


def to_dict_fields(config) -> dict:
    values = to_dict(config)
    del values["policy"]
    return values


@pytest.mark.parametrize("config", EXAMPLES, ids=lambda config: config.policy)
def test_a_policy_survives_json(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_every_policy_without_a_ranking_has_an_example_here():
    assert {config.policy for config in EXAMPLES} == {config.policy for config in BY_POSITION}


def test_unknown_policies_and_settings_are_refused_by_name():
    with pytest.raises(UserError, match=r"unknown policy 'magic'.*learned"):
        from_dict({"policy": "magic"})
    with pytest.raises(UserError, match=r"window has no setting 'width'.*widths"):
        from_dict({"policy": "window", "width": 3})


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: WindowConfig(()), "window widths"),
        (lambda: WindowConfig((0,)), "window widths"),
        (lambda: StridedConfig((4,), (1, 1)), "equally long"),
        (lambda: StridedConfig((0,), (1,)), "equally long"),
        (lambda: ctxprune.retrofit(small_model(), WindowConfig((4, 4))), "one per layer"),
        (lambda: ctxprune.retrofit(small_model(), StridedConfig((4, 4), (1, 1))), "one per layer"),
        (lambda: ctxprune.retrofit(small_model(), WindowConfig((4, 4, 4, 4))), "4 widths, the model 3 layers"),
        (lambda: ctxprune.retrofit(small_model(), StridedConfig((4,) * 4, (1,) * 4)), "4 blocks, the model 3 layers"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(make, named):
    with pytest.raises(UserError, match=named) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_refused_policy_leaves_the_model_as_it_was():
    model, ids = small_model(), tokens(1, 9)
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(UserError):
            ctxprune.retrofit(model, WindowConfig((4, 4)))
        assert not wrappers(model)
        assert torch.equal(model(ids).logits, before)


def test_like_tokens_tie_in_float64_however_many_are_scored_together(monkeypatch):
    """Products of another shape round otherwise on some processors: here each pass has noise of its own."""
    draw, forward = torch.Generator().manual_seed(0), HiddenScorer.forward

    def noisy(self, hidden):
        said = forward(self, hidden)
        return said * (1 + 1e-15 * torch.randn(said.shape, generator=draw, dtype=said.dtype))

    scorer, alike = HiddenScorer(8, 4).double(), torch.randn(8, dtype=torch.float64).expand(1, 50, 8)
    keys = torch.zeros(1, 1, 50, 4)
    monkeypatch.setattr(HiddenScorer, "forward", noisy)
    assert len(scorer(alike).unique()) > 1
    assert len(scorer.own(Arrivals(alike, None, torch.arange(50)[None], keys, keys)).unique()) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_ranks_keys_is_computed_in_float32(dtype):
    """Of numbers rounded to 16 bits, but in 32: eight bits tie what should be ranked, and float16 ends at 65,504."""
    draw = torch.Generator().manual_seed(0)
    query, key = (100 * torch.randn(2, 2, n, 8, generator=draw).to(dtype) for n in (3, 9))
    seen = torch.ones(2, 1, 3, 9, dtype=torch.bool)
    assert torch.equal(attention(query, key, seen, 0.01), attention(query.float(), key.float(), seen, 0.01))
    position = torch.arange(9).expand(2, 9)
    new, exact = (Arrivals(torch.zeros(2, 9, 4), None, position, k, k) for k in (key, key.float()))
    norms = KeyNormScorer(low=True, apart=False)
    assert torch.equal(norms.own(new), norms.own(exact))
    alive, now, none = torch.ones(2, 9, dtype=torch.bool), torch.full((2,), 8), torch.zeros(2, 9)
    asked, when = torch.zeros(2, 2, 0, 8), torch.zeros(2, 0, dtype=torch.long)
    one, other = (Signals(position, alive, now, k, k, asked.to(k), when, none, none, 1.0) for k in (key, key.float()))
    assert torch.equal(KeyDiffScorer().score(one), KeyDiffScorer().score(other))


@pytest.mark.parametrize("normalised", [False, True])
def test_keys_of_the_window_are_worth_what_its_queries_say(normalised):
    """A key that each later query looks at as much is worth as much, where it is divided by these alone."""
    position, alive = torch.arange(6).expand(1, 6), torch.ones(1, 6, dtype=torch.bool)
    keys, queries = torch.zeros(1, 1, 6, 2), torch.zeros(1, 2, 4, 2)
    none, asked = torch.zeros(1, 6), torch.tensor([[-1, 3, 4, 5]])
    seen = Signals(position, alive, torch.tensor([5]), keys, keys, queries, asked, none, none, 1.0)
    found = SnapKVScorer(window=4, pool=1, normalised=normalised).score(seen)
    sums = torch.tensor([[1 / 4 + 1 / 5 + 1 / 6] * 4 + [1 / 5 + 1 / 6, 1 / 6]])
    assert torch.allclose(found, sums / torch.tensor([[3, 3, 3, 3, 2, 1]]) if normalised else sums / 3)


@pytest.mark.parametrize("seed", range(5))
def test_a_token_is_as_frequent_as_it_stands_among_the_keys_alive(seed):
    draw = torch.Generator().manual_seed(seed)
    own, alive = torch.randint(6, (4, 40), generator=draw).double(), torch.rand(4, 40, generator=draw) < 0.7
    nothing = torch.zeros(4, 1, 40, 2)
    found = ContextScorer().score(
        Signals(
            torch.arange(40).expand(4, -1), alive, torch.full((4,), 40), nothing, nothing, nothing[:, :, :1],
            torch.zeros(4, 1).long(), own.masked_fill(~alive, torch.nan), torch.zeros(4, 40), 1.0,
        )
    )  # fmt: skip
    counts = ((own[:, :, None] == own[:, None]) & alive[:, None]).sum(-1)
    assert torch.equal(-found[alive], counts[alive].double())
