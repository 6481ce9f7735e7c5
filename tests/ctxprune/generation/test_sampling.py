"""Are tokens drawn by their probabilities, each row from a stream of its own?"""

from __future__ import annotations

import pytest
import torch

from ctxprune.generation import sampling
from ctxprune.generation.sampling import RowDraws, Sampling, drawn, pick

CPU = torch.device("cpu")
VOCAB = 12


def test_each_token_has_as_much_of_the_unit_interval_as_its_probability():
    probability = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    uniform = (torch.arange(1024, dtype=torch.float64) + 0.5) / 1024
    tokens = drawn(probability.expand(1024, -1), uniform)
    assert torch.bincount(tokens, minlength=6).tolist() == [0, 256, 0, 512, 256, 0]
    assert torch.equal(drawn(3.0 * probability.expand(1024, -1), uniform), tokens), "what need not sum to 1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_token_of_probability_0_is_drawn_at_either_end(dtype):
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(2000, 7, generator=generator, dtype=dtype)
    probability[:, [0, 6]] = 0.0
    probability /= probability.sum(-1, keepdim=True)
    for uniform in (0.0, 1.0 - 2.0**-53):
        chosen = drawn(probability, torch.full((2000,), uniform, dtype=torch.float64))
        assert bool((probability.gather(1, chosen[:, None]) > 0).all())


def test_twin_tokens_found_from_the_left_are_those_of_probability_0(monkeypatch):
    original = torch.searchsorted
    monkeypatch.setattr(torch, "searchsorted", lambda table, at, right: original(table, at, right=False))
    with pytest.raises(AssertionError):
        test_no_token_of_probability_0_is_drawn_at_either_end(torch.float32)


def test_a_rows_token_depends_on_its_own_settings_and_generator_alone():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    how = [Sampling(), *(Sampling(0.8, top_k=9, seed=row) for row in range(3)), Sampling(1.3, top_p=0.7), Sampling(0.8)]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in range(6)]

    together = pick(logits, how, generators())
    alone = [pick(logits[row : row + 1], [how[row]], [one])[0] for row, one in enumerate(generators())]
    assert together.tolist() == [int(token) for token in alone] and together[0] == logits[0].argmax()


def numbers(draws: RowDraws, counts: list[int]) -> torch.Tensor:
    return torch.cat([draws.uniform(count) for count in counts], 1)


def test_a_rows_numbers_are_its_seeds_however_they_are_asked_for_and_whoever_else_is_there(monkeypatch):
    monkeypatch.setattr(RowDraws, "BLOCK", 4)
    whole = numbers(RowDraws([5], CPU), [1] * 12)
    three = RowDraws([3, 4, 5], CPU)
    first = numbers(three, [2, 3])
    three.select([2, 0])
    rest = numbers(three, [1, 4, 2])
    assert torch.equal(torch.cat([first[2:], rest[:1]], 1), whole)
    assert torch.equal(rest[1:], numbers(RowDraws([3], CPU), [5, 7])[:, 5:])
    assert len(torch.cat([first.flatten(), rest.flatten()]).unique()) == 15 + 14, "no number comes twice"


def test_twin_numbers_that_do_not_move_with_their_rows_are_caught(monkeypatch):
    monkeypatch.setattr(RowDraws, "select", lambda draws, rows: None)
    with pytest.raises(AssertionError):
        test_a_rows_numbers_are_its_seeds_however_they_are_asked_for_and_whoever_else_is_there(monkeypatch)


def test_what_is_drawn_has_the_frequencies_of_its_probabilities():
    probability = sampling.probabilities(torch.tensor([[0.0, 1.0, 2.0, -1.0]]), Sampling(1.0)).expand(4000, -1)
    found = torch.bincount(RowDraws(range(4000), CPU).pick(probability), minlength=4) / 4000
    torch.testing.assert_close(found, probability[0], atol=0.03, rtol=0.0)


def test_a_row_of_numbers_that_are_none_harms_no_neighbour():
    logits = torch.randn(3, VOCAB)
    how = [Sampling(temperature=1.0, top_p=0.9, seed=row) for row in range(3)]

    def picked() -> list[int]:
        return pick(logits, how, [torch.Generator().manual_seed(row) for row in range(3)]).tolist()

    wanted = picked()
    logits[1] = torch.nan
    found = picked()
    assert (found[0], found[2]) == (wanted[0], wanted[2]) and 0 <= found[1] < VOCAB
