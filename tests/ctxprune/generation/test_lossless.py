"""Does the lossless mode write what the dense model writes, greedy token by token, sampled in distribution?"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest
import torch

import ctxprune
from ctxprune import UserError, generate, generate_lossless
from ctxprune.cache.layer_cache import LayerCache
from ctxprune.cache.pruned_cache import PrunedCache
from ctxprune.generation import lossless as module
from ctxprune.generation.lossless import settle
from ctxprune.generation.speculation import DraftLength, speedup, verifying
from tests.models import gated, tokens

TOKENS = int(os.environ.get("CTXPRUNE_TOKENS", "2000"))
"""Greedy tokens that are compared."""


def dense(model, prompts, count: int) -> list[list[int]]:
    with ctxprune.mode(model, "dense"):
        return [generate(model, [prompt], max_new_tokens=count).tokens[0].tolist() for prompt in prompts]


def prompts_of(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    return [tokens(1, n, seed=100 * seed + n)[0] for n in lengths]


@pytest.mark.parametrize("draft", [1, 4, None])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral-sliding"])
def test_greedy_text_is_the_dense_models(family, draft):
    model, prompts = gated(family).double(), prompts_of(3, 40, 11)
    made = generate_lossless(model, prompts, max_new_tokens=30, draft=draft)
    assert [row.tolist() for row in made.tokens] == dense(model, prompts, 30)
    assert 0 < made.accepted < made.drafted and made.passes < 3 * 30


def test_drops_that_propagate_in_depth_are_taken_back_too():
    model, prompts = gated(propagate_in_depth=True, beta=4.0).double(), prompts_of(20, 9)
    made = generate_lossless(model, prompts, max_new_tokens=40, draft=3)
    assert [row.tolist() for row in made.tokens] == dense(model, prompts, 40)


@pytest.mark.timeout(600)
def test_no_token_differs():
    """Over thousands of greedy tokens, in float64."""
    written = mismatches = seed = 0
    while written < TOKENS:
        model = gated(("llama", "gpt2", "qwen3")[seed % 3], seed=seed, beta=(0.5, 3.0, 6.0)[seed // 3 % 3]).double()
        prompts = prompts_of(5, 17, 30, 44, seed=seed)
        made = generate_lossless(model, prompts, max_new_tokens=80, draft=(None, 2, 5)[seed % 3])
        for row, wanted in zip(made.tokens, dense(model, prompts, 80), strict=True):
            mismatches += sum(a != b for a, b in zip(row.tolist(), wanted, strict=True))
            written += len(wanted)
        seed += 1
    assert mismatches == 0 and written >= TOKENS


def test_drafts_are_the_pruned_models_own():
    """What is drafted after refused drafts is what the pruned model would have written after the same text."""
    model, prompt, seen = gated().double(), tokens(1, 20)[0], []
    original = module.settle_greedy

    def heard(drafts, choices):
        seen.append(drafts[0].tolist())
        return original(drafts, choices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "settle_greedy", heard)
        made = generate_lossless(model, [prompt], max_new_tokens=40, draft=3)
    text, place, compared = torch.cat([prompt, made.tokens[0]]), len(prompt) + 1, 0
    for drafts in seen:
        if drafts:
            assert generate(model, [text[:place]], max_new_tokens=len(drafts)).tokens[0].tolist() == drafts
        compared += len(drafts)
        there = text[place : place + len(drafts)].tolist()
        place += next((i for i, token in enumerate(there) if token != drafts[i]), len(there)) + 1
    assert compared > 40 and made.accepted < made.drafted


def test_twin_keys_that_stay_dropped_after_a_refused_draft_are_caught(monkeypatch):
    original = LayerCache.rewind
    monkeypatch.setattr(
        LayerCache, "rewind", lambda layer, length, end_of: original(layer, length, lambda p, row: torch.zeros_like(p))
    )
    with pytest.raises(AssertionError):
        test_drafts_are_the_pruned_models_own()


def test_twin_refused_drafts_that_stay_in_the_full_cache_are_caught(monkeypatch):
    original = PrunedCache.rewind

    def keeps(cache, length):
        original(cache, torch.maximum(length, cache.lengths - 1) if not cache.held[0].gated else length)

    monkeypatch.setattr(PrunedCache, "rewind", keeps)
    model, prompts = gated().double(), prompts_of(20, 9)
    made = generate_lossless(model, prompts, max_new_tokens=30, draft=4)
    assert [row.tolist() for row in made.tokens] != dense(model, prompts, 30)


def test_each_row_ends_at_its_own_end_of_text():
    model, ids = gated().double(), tokens(4, 10)
    free = dense(model, ids, 20)
    end = free[0][3]
    wanted = [row[: row.index(end) + 1] if end in row else row for row in free]
    heard = []
    made = generate_lossless(
        model, ids, max_new_tokens=20, eos_token_id=end, on_token=lambda row, token: heard.append((row, token))
    )
    assert [row.tolist() for row in made.tokens] == wanted
    for row in range(4):
        assert [token for index, token in heard if index == row] == wanted[row]
    several = generate_lossless(model, ids, max_new_tokens=20, eos_token_id=[end, 10**6])
    assert [row.tolist() for row in several.tokens] == wanted


class Branches:
    """Draws that follow every branch: a run is repeated until all its random choices have been made, each weighted by
    its probability."""

    def __init__(self):
        self.script: list[tuple[float, object]] = []

    def every(self, run: Callable[[Branches], object]) -> list[tuple[float, object]]:
        """(probability, result) of each way through."""
        results, todo = [], [[]]
        while todo:
            self.script, self.place, self.chance, self.open = todo.pop(), 0, 1.0, []
            outcome = run(self)
            results.append((self.chance, outcome))
            todo += self.open
        return results

    def choose(self, options: list[tuple[float, object]]) -> object:
        if self.place < len(self.script):
            option = self.script[self.place]
        else:
            option, *others = [option for option in options if option[0] > 0]
            self.open += [[*self.script[: self.place], other] for other in others]
            self.script = [*self.script[: self.place], option]
        self.place += 1
        self.chance *= option[0]
        return option[1]

    def pick(self, probability: torch.Tensor) -> torch.Tensor:
        (weights,) = (probability / probability.sum(-1, keepdim=True)).tolist()
        return torch.tensor([self.choose([(p, token) for token, p in enumerate(weights)])])


class Uniform(Branches):
    """A uniform number decides only whether it is below one threshold: two branches suffice, and these are told."""

    def __init__(self, drafts, proposed, exact):
        super().__init__()
        self.accept = [
            min(1.0, float(p[d]) / float(q[d])) for d, q, p in zip(drafts, proposed, exact[:-1], strict=True)
        ]

    def uniform(self, count: int) -> torch.Tensor:
        assert count == len(self.accept)
        numbers = [self.choose([(accept, 0.0), (1 - accept, 1.0 - 1e-12)]) for accept in self.accept]
        return torch.tensor([numbers], dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2])
def test_the_rule_of_sampling_by_exact_enumeration(count):
    """Five tokens: over all drafts and all random outcomes the first tokens written are distributed as dense ones."""
    generator = torch.Generator().manual_seed(count)

    def distribution(*shape):
        weights = torch.rand(*shape, generator=generator, dtype=torch.float64)
        weights[weights < 0.2] = 0  # tokens that top-k or top-p left out
        return weights / weights.sum(-1, keepdim=True)

    # What comes second depends on what came first: one distribution per first token.
    first_p, first_q, second_p, second_q, third_p = (
        distribution(5), distribution(5), distribution(5, 5), distribution(5, 5), distribution(5, 5, 5),
    )  # fmt: skip
    found = torch.zeros(5, 5, dtype=torch.float64)
    for drafts in itertools.product(range(5), repeat=count):
        chance = float(first_q[drafts[0]]) * (float(second_q[drafts[0], drafts[1]]) if count == 2 else 1.0)
        if chance == 0:
            continue
        proposed = torch.stack([first_q, second_q[drafts[0]]][:count])
        exact = [first_p, second_p[drafts[0]]] + ([third_p[drafts[0], drafts[1]]] if count == 2 else [])
        draws = Uniform(drafts, proposed, exact)

        def run(branches, drafts=drafts, proposed=proposed, exact=exact):
            return settle(torch.tensor([drafts]), proposed[None], torch.stack(exact)[None], branches)[0]

        for probability, written in draws.every(run):
            if len(written) == 1:  # a round later the second token is drawn as dense draws it
                found[written[0]] += chance * probability * second_p[written[0]]
            else:
                found[written[0], written[1]] += chance * probability
    torch.testing.assert_close(found, first_p[:, None] * second_p, rtol=1e-12, atol=1e-14)


def test_twin_a_refused_draft_drawn_again_from_the_exact_distribution_is_caught(monkeypatch):
    original = torch.Tensor.clamp
    monkeypatch.setattr(torch.Tensor, "clamp", lambda t, *a, **k: t * 0 if k == {"min": 0} else original(t, *a, **k))
    with pytest.raises(AssertionError):
        test_the_rule_of_sampling_by_exact_enumeration(1)


def test_sampled_text_has_the_dense_models_frequencies():
    """The whole machinery: second tokens of many samples, against the exact distribution."""
    model, prompt = gated(beta=1.0).double(), tokens(1, 12)[0]
    how, count = {"temperature": 0.7, "top_k": 4}, 1500
    made = generate_lossless(model, [prompt] * count, max_new_tokens=3, draft=2, seed=0, **how)
    assert 0.05 < made.acceptance < 0.95
    seen = {}
    for row in made.tokens:
        key = tuple(row[:2].tolist())
        seen[key] = seen.get(key, 0) + 1
    exact = {}
    sampling = ctxprune.generation.sampling.Sampling(**how)
    with torch.no_grad(), ctxprune.mode(model, "dense"):
        first = ctxprune.generation.sampling.probabilities(model(prompt[None]).logits[0, -1], sampling)
        for token in first.nonzero().flatten().tolist():
            logits = model(torch.cat([prompt, torch.tensor([token])])[None]).logits[0, -1]
            second = ctxprune.generation.sampling.probabilities(logits, sampling)
            for other in second.nonzero().flatten().tolist():
                exact[token, other] = float(first[token] * second[other])
    assert set(seen) <= set(exact)
    chi = sum((seen.get(key, 0) - count * p) ** 2 / (count * p) for key, p in exact.items() if count * p >= 5)
    bins = sum(count * p >= 5 for p in exact.values())
    assert chi < bins + 4 * (2 * bins) ** 0.5


class Weighs:
    """A cache whose bytes make a draft cost a quarter of a step: full at first, then pruned."""

    def __init__(self, length: DraftLength):
        weights = length.weight_bytes
        self.bytes = [11 * weights, 2 * weights]  # (1 + 2) / (1 + 11)

    def live_bytes(self) -> int:
        return self.bytes.pop(0)


def test_the_draft_length_follows_acceptance_and_bytes():
    assert speedup(0.9, 0, 0.3) == 1.0
    # policies of the literature: 0.9 accepted, twice as many bytes of cache as of weights, a tenth of it kept.
    cost = (1 + 0.1 * 2) / (1 + 2)
    assert max(speedup(0.9, g, cost) for g in range(1, 17)) == pytest.approx(1.49, abs=0.02)
    assert max(speedup(0.7, g, (1 + 0.01) / (1 + 0.1)) for g in range(1, 17)) < 1
    model = gated()
    length = DraftLength(model)
    length.draft_cost, choices = cost, []
    for acceptance in (0.3, 0.6, 0.9, 0.98):
        length.acceptance = acceptance
        choices.append(max(range(1, 17), key=lambda g: speedup(length.acceptance, g, cost)))
    assert choices == sorted(choices) and choices[0] == 1 < choices[-1]
    # A CPU verifies in fours: a draft that begins another four has to pay for it, where any GPU's may come for nothing.
    costs = [verifying(drafts, on_a_cpu=True) for drafts in (1, 3, 4, 7)]
    assert costs[0] == costs[1] < costs[2] == costs[3] and len({verifying(g, on_a_cpu=False) for g in (1, 9)}) == 1
    length.acceptance, length.draft_cost = 0.8, 0.25
    assert length.best(*[Weighs(length)] * 2) == 3
    before = length.acceptance
    length.learn(4, 1)
    assert length.acceptance < before and (length.drafted, length.accepted) == (4, 1)


def test_what_it_reports():
    model, prompts = gated().double(), prompts_of(20, 9)
    made = generate_lossless(model, prompts, max_new_tokens=30, draft=3)
    assert made.acceptance == made.accepted / made.drafted and 0 < made.expected_speedup < 1
    open_made = generate_lossless(gated(beta=1e4).double(), prompts, max_new_tokens=30, draft=3)
    assert open_made.acceptance == 1.0 and open_made.passes < made.passes
    assert open_made.steps == pytest.approx(3 * open_made.passes, abs=3)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"draft": 0}, "draft is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"max_new_tokens": 500}, "exceed the model's 128 positions"),
    ],
)
def test_settings_out_of_range_are_refused(how, named):
    with pytest.raises(UserError, match=named):
        generate_lossless(gated(), tokens(1, 4), **how)
    with pytest.raises(UserError, match="prompt is empty"):
        generate_lossless(gated(), [])
    with ctxprune.mode(model := gated(), "dense"), pytest.raises(UserError, match="nothing that could draft"):
        generate_lossless(model, tokens(1, 4))
