"""Is every place where learned pruning does not win found, and none made up?"""

from __future__ import annotations

import pytest

from pipelines import losses, table
from tests.results import result, whole

DENSE = whole("d", policy="dense", target=None, perplexity=10.0, cache_bytes=4000, tokens_per_second=100.0)
WINS = [
    DENSE,
    whole("l", perplexity=10.2, cache_bytes=800),
    whole("w", policy="window", perplexity=11.0, cache_bytes=700),
    whole("s", policy="strided", perplexity=12.0, cache_bytes=600),
]
CURVES = {"d": [{"step": 1, "tokens_per_second": 50.0}, {"step": 9, "tokens_per_second": 100.0}]}
LEARNED_CURVE = {"l": [{"step": 9, "tokens_per_second": 101.0}]}


def judged(results, curves=()) -> losses.Verdict:
    return losses.verdict(table.rows(results), CURVES | dict(curves))


def planted(**changes) -> list[dict]:
    """The sweep that learned pruning wins, but for these fields of the learned trial."""
    return [one | changes if one["trial"] == "l" else one for one in WINS]


def test_a_sweep_that_learned_pruning_wins_has_no_sentence_and_says_what_was_compared():
    verdict = judged(WINS, LEARNED_CURVE)
    assert verdict.found == []
    assert verdict.compared.startswith("1 learned setting compared: ")
    assert all(
        f"{question} for 1" in verdict.compared for question in losses.QUESTIONS.values() if "cache" not in question
    )
    assert "of equal quality for 0" in verdict.compared
    assert verdict.compared.endswith("Learned pruning lost none of these comparisons.")


PLANTED = [
    (
        {"perplexity": 11.55},
        "tiny at 80%: learned (perplexity 11.55, 80.0% dropped) is 5.0% worse than window (perplexity 11.00, "
        "80.0% dropped), the best other rule of that budget.",
    ),
    (
        {"perplexity": 11.0, "cache_bytes": 600},
        "tiny at 80%: learned (perplexity 11.00, 80.0% dropped) is no better than window (perplexity 11.00, "
        "80.0% dropped), the best other rule of that budget.",
    ),
    (
        {"tokens_per_second": 90.0},
        "tiny at 80%: learned decodes at 0.90x the speed of dense in the same process.",
    ),
    (
        {"tokens_per_second": 110.0, "tokens_per_second_spread": [95.0, 115.0]},
        "tiny at 80%: learned decodes at 1.10x the speed of dense in the same process, but its slowest repetition at "
        "0.95x.",
    ),
    (
        {"sparsity": 0.785},
        "tiny at 80%: learned misses its target, 78.5% dropped: 1.5 points less than asked.",
    ),
    (
        {"sparsity": 0.81},
        "tiny at 80%: learned misses its target, 81.0% dropped: 1.0 points more than asked.",
    ),
    (
        {"perplexity": 10.96},
        "tiny at 80%: learned (perplexity 10.96, 80.0% dropped) holds 0.200 of the dense cache, window (perplexity "
        "11.00, 80.0% dropped) holds 0.175 at equal or better quality.",
    ),
]


@pytest.mark.parametrize(("changes", "sentence"), PLANTED, ids=[" ".join(changes) for changes, _ in PLANTED])
def test_a_planted_loss_is_one_sentence_with_its_numbers(changes, sentence):
    verdict = judged(planted(**changes), LEARNED_CURVE)
    assert sentence in verdict.found
    assert "lost none" not in verdict.compared


def test_slower_training_is_told_by_the_last_row_of_each_curve():
    verdict = judged(WINS, {"l": [{"step": 1, "tokens_per_second": 999.0}, {"step": 9, "tokens_per_second": 80.0}]})
    assert verdict.found == ["tiny at 80%: learned trains at 0.80x the speed of dense (80.00 against 100.00 tokens/s)."]


def seeds(policy: str, values, **more) -> list[dict]:
    return [
        result(f"{policy}{seed}", policy=policy, perplexity=value, seed=seed, **more)
        for seed, value in enumerate(values)
    ]


def test_seeds_decide_what_a_difference_is():
    won = judged([*seeds("learned", (10.0, 10.2)), *seeds("window", (10.3, 10.5))])
    assert won.found == []
    (close,) = judged([*seeds("learned", (10.0, 10.4)), *seeds("window", (10.3, 10.5))]).found
    assert "1.9% better than window" in close and close.endswith("the seeds overlap: no difference is shown.")
    (lost,) = judged([*seeds("learned", (10.6, 10.8)), *seeds("window", (10.3, 10.5))]).found
    assert "worse than window" in lost and lost.endswith("in every seed.") and "10.60 to 10.80 in 2 seeds" in lost


def test_seeds_that_miss_to_either_side_do_not_hit():
    results = [
        result("a", sparsity=0.78, seed=0, perplexity=10.0), result("b", sparsity=0.82, seed=1, perplexity=10.0)
    ]  # fmt: skip
    (missed,) = judged(results).found
    assert "the worst of 2 seeds dropped" in missed and "2.0 points" in missed


def test_trials_that_differ_in_more_than_seeds_are_told_apart():
    results = [result("a", perplexity=10.0, seed=0), result("b", perplexity=13.0, seed=0)]
    verdict = judged([*results, result("w", policy="window", perplexity=12.0, seed=0)])
    assert verdict.compared.startswith("2 learned settings compared")
    assert len(verdict.found) == 1 and "perplexity 13.00" in verdict.found[0]


def test_another_budget_and_another_model_are_no_rivals():
    results = [
        result("l", perplexity=12.0, cache_bytes=9, cache_bytes_dense=10),
        result("w", policy="window", target=0.5, perplexity=10.0, cache_bytes=9, cache_bytes_dense=10),
        result("m", model="big", policy="window", perplexity=5.0, cache_bytes=1, cache_bytes_dense=10),
    ]
    assert judged(results).found == []


def test_nothing_learned_is_nothing_compared():
    assert judged([DENSE]) == losses.Verdict("No learned trial has finished: nothing was compared.", [])


def test_a_weight_without_a_target_is_placed_by_its_sparsity():
    (lost,) = judged(
        [result("l", target=None, sparsity=0.731, perplexity=12.0), *seeds("window", [9.0], sparsity=0.73)]
    ).found
    assert lost.startswith("tiny at 73.1%: learned")
