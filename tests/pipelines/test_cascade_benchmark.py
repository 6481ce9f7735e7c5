"""Does the cascade's benchmark say whether the promise was kept, on questions that no threshold has seen?"""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import Tensor

from ctxprune.generation.cascade import Stage, answered, upper_limit
from ctxprune.text.batches import IGNORED
from pipelines import __main__, output
from pipelines.benchmark_config import CascadeConfig
from pipelines.cascade_benchmark import asking, judging, lines, records
from pipelines.cascade_benchmark.asking import Asked, questions
from pipelines.policy_study import methods
from pipelines.policy_study.fine_tune import FineTuning

WORDS = ["benchmark", "target=cascade"]


def said(answer: list[int], sure: list[float]) -> Tensor:
    """Probabilities of two choices."""
    given, sure = torch.tensor(answer), torch.tensor(sure, dtype=torch.double)
    return torch.stack([torch.where(given == 0, sure, 1 - sure), torch.where(given == 1, sure, 1 - sure)], 1)


def drawn(count: int, seed: int) -> Asked:
    """Answers whose error rate is known: P(wrong | sure) = 2 (1 - sure), sure uniform above a half; both stages."""
    draw = torch.Generator().manual_seed(seed)
    small = {}
    first = 0.5 + 0.5 * torch.rand(count, generator=draw, dtype=torch.double)
    # The second stage is sure where the first is not: no question has both of their errors.
    for budget, sure in ((4, first), (8, 1.5 - first)):
        wrong = torch.rand(count, generator=draw, dtype=torch.double) > 2 * sure - 1
        small[budget] = said(wrong.long().tolist(), sure.tolist())
    truth = torch.zeros(count, dtype=torch.long)
    return Asked(small, said([0] * count, [0.9] * count), truth, 20)


def promise(draws: int = 60) -> judging.Record:
    record = judging.judge(drawn(draws * 300, 0), drawn(20_000, 1), (4, 8), draws, risk=0.1, confidence=0.9)
    assert record["kept"], f"broken in {record['broken']} of {draws}"
    return record


def test_the_promise_holds_over_many_draws():
    record = promise()
    assert record["answered"][0] > 0.1 and record["answered"][1] > 0.1, "something was answered early"
    assert 0 < record["differing"] < 0.1


def test_twin_thresholds_without_a_limit_break_the_promise(monkeypatch):
    monkeypatch.setattr("ctxprune.generation.cascade.upper_limit", lambda errors, trials, confidence: errors / trials)
    with pytest.raises(AssertionError, match="broken in"):
        promise()


def test_twin_thresholds_that_forget_the_other_stage_break_the_promise(monkeypatch):
    """Each stage given the whole risk."""
    real = upper_limit
    monkeypatch.setattr("ctxprune.generation.cascade.upper_limit", lambda *given: real(*given) / 2)
    with pytest.raises(AssertionError, match="broken in"):
        promise()


def test_what_thresholds_do_is_counted_by_hand():
    small = {4: said([0, 1, 0, 0], [0.9, 0.8, 0.6, 0.6]), 8: said([0, 0, 1, 0], [0.7, 0.7, 0.9, 0.6])}
    test = Asked(small, said([0, 0, 0, 1], [1.0] * 4), torch.tensor([0, 1, 0, 0]), 10)
    stages = [Stage(4, 0.8), Stage(8, 0.9)]
    found = answered(stages, small, test.whole)
    assert found.answer.tolist() == [0, 1, 1, 1] and found.budget.tolist() == [4, 4, 8, 0]
    assert found.confidence.tolist() == pytest.approx([0.9, 0.8, 0.9, 1.0])
    outcome = judging._outcome(stages, small, test)
    assert outcome["answered"] == [0.5, 0.25, 0.25] and outcome["differing"] == 2 and outcome["right"] == 0.5
    assert outcome["live_tokens"] == 0.5 * 4 + 0.25 * 8 + 0.25 * 10
    assert outcome["tokens_read"] == 0.5 * 1 + 0.25 * 2 + 0.25 * 3
    # 10 + 6 * 4 = 34 pairs with 4 keys, 36 + 2 * 8 = 52 with 8, 55 with all.
    assert outcome["attended"] == pytest.approx((0.5 * 34 + 0.25 * (34 + 52) + 0.25 * (34 + 52 + 55)) / 55)


def test_a_stage_that_never_answers_is_not_asked():
    small = {4: said([1], [0.9]), 8: said([1], [0.9])}
    test = Asked(small, said([0], [0.6]), torch.tensor([0]), 10)
    outcome = judging._outcome([Stage(4, float("inf")), Stage(8, float("inf"))], small, test)
    assert outcome["answered"] == [0.0, 0.0, 1.0] and outcome["tokens_read"] == outcome["attended"] == 1.0


@pytest.mark.parametrize(("tokens", "live"), [(1, 4), (4, 4), (9, 4), (9, 1)])
def test_pairs_are_counted(tokens, live):
    assert judging.pairs(tokens, live) == sum(min(place, live) for place in range(1, tokens + 1))


def test_limits_are_clopper_and_pearsons():
    assert judging.limits(3, 50) == pytest.approx([0.012549, 0.165482], abs=1e-5)
    assert judging.limits(0, 20) == pytest.approx([0.0, 1 - 0.025 ** (1 / 20)])
    assert judging.limits(20, 20) == pytest.approx([0.025 ** (1 / 20), 1.0])


def test_questions_are_independent_and_their_answers_true():
    prompts, truth = questions(asking.TASK, "validation", 300)
    assert prompts.shape == (300, asking.TASK.length + 1) and len(prompts.unique(dim=0)) == 300
    for prompt, value in zip(prompts.tolist(), truth.tolist(), strict=True):
        place = prompt.index(prompt[-1])  # FACT key value, before the question
        assert prompt[place + 1] == asking.TASK.symbols.first_value + value
    assert IGNORED not in truth
    others, _ = questions(asking.TASK, "test", 300)
    assert not {tuple(row) for row in prompts.tolist()} & {tuple(row) for row in others.tolist()}


def test_every_budget_and_risk_has_its_lines():
    settings = CascadeConfig(budgets=[4], risks=[0.1, 0.05], draws=3, questions=300)
    made = list(records(settings, drawn(900, 0), drawn(500, 1)))
    assert [(one["budgets"], one["risk"]) for one in made] == [([4, 8], 0.05), ([4, 8], 0.1)]
    text = lines.line(made[1])
    assert "4, 8, then all 20 keys, risk 10.0%: promise kept: above it in 0 of 3 draws of 300 questions" in text
    assert "on 500 unseen questions" in text and "whole 100.0%" in text and text.count("\n") == 2
    assert "promise BROKEN" in lines.line(made[1] | {"kept": False})
    assert "asking again costs more" in lines.line(made[1] | {"attended": 1.2})
    assert "asking again costs more" not in lines.line(made[1] | {"attended": 0.9})


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "take_stdout", lambda: None)
    monkeypatch.setattr(output, "set_up_logging", lambda: None)
    return tmp_path


def test_the_verb_trains_asks_and_judges_once(here, capsys, monkeypatch):
    monkeypatch.setattr(methods, "FineTuning", partial(FineTuning, steps=2))
    words = [
        "cascade.budgets=[8]",
        "cascade.risks=[0.5]",
        "cascade.draws=2",
        "cascade.questions=20",
        "cascade.judged=30",
    ]
    words += ["study.steps=2", "study.rows=16", "format=json"]
    assert __main__.main([*WORDS, *words]) == 0
    (record,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert record["kind"] == "cascade" and record["judged_questions"] == 30 and record["prompt_tokens"] == 97
    assert sum(record["answered"]) == pytest.approx(1) and record["machine"] and record["cascade"]["draws"] == 2
    monkeypatch.setattr(asking, "_ask", lambda *_: pytest.fail("asked again"))
    assert __main__.main([*WORDS, *words]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == record


def test_a_broken_promise_is_told_by_the_exit_code(here, capsys, monkeypatch):
    monkeypatch.setattr(asking, "asked", lambda *_: (drawn(900, 0), drawn(500, 1)))
    words = ["cascade.budgets=[4]", "cascade.risks=[0.1]", "cascade.draws=3", "cascade.questions=300"]
    assert __main__.main([*WORDS, *words]) == 0
    monkeypatch.setattr("ctxprune.generation.cascade.upper_limit", lambda *_: 0.0)  # answers whatever it is
    assert __main__.main([*WORDS, *words]) == 1
    assert "BROKEN" in capsys.readouterr().out


MISTAKES = [
    (["cascade.budgets=[]"], "cascade.budgets is empty: list at least one"),
    (["cascade.risks=[]"], "cascade.risks is empty: list at least one"),
    (["cascade.budgets=[2]"], "cascade.budgets=2: give a whole number in [3, 65536]"),
    (["cascade.budgets=[49]"], "cascade.budgets holds 49, and twice as many hold a whole prompt of 97 tokens"),
    (["cascade.risks=[1.0]"], "cascade.risks=1.0: give a number in (0, 1)"),
    (["cascade.confidence=1.0"], "cascade.confidence=1.0: give a number in (0, 1)"),
    (["cascade.questions=735"], "cascade.questions=735 can never bear out a risk of 0.01, even without an error: give"),
    (["cascade.questions=735"], "give at least 736"),
    (["cascade.draws=0"], "cascade.draws=0: give a whole number in [1, 10000]"),
    (["cascade.risk=0.1"], 'no setting "cascade.risk"; nearest: cascade.risks'),
    (["checkpoint=."], "target=cascade trains a small model of its own: leave checkpoint out"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_one_line_before_any_training(here, capsys, monkeypatch, words, expected):
    monkeypatch.setattr(asking, "asked", lambda *_: pytest.fail("trained"))
    assert __main__.main([*WORDS, *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and expected in printed.err
