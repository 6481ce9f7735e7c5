"""Is the truth of synthetic tasks true? What is needed is enough, no less is, and no question gives another away."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ctxprune.errors import UserError
from ctxprune.tasks import SYNTHETIC
from ctxprune.tasks.dialogue import DialogueConfig
from ctxprune.tasks.needle import NeedleConfig, grid
from ctxprune.tasks.overwrite import OverwriteConfig
from ctxprune.tasks.questions import QuestionsConfig
from ctxprune.tasks.recall import RecallConfig
from ctxprune.tasks.recall_invisible import RecallInvisibleConfig
from ctxprune.tasks.symbols import DECOY, FACT, RULE, SEP, SPECIAL, START, TURN
from ctxprune.tasks.task import SPLITS, TaskBatch
from ctxprune.text.batches import IGNORED

SMALL = [
    RecallConfig(length=40, facts=5, decoys=3),
    NeedleConfig(length=30),
    OverwriteConfig(length=40, variables=4, writes=9),
    QuestionsConfig(length=40, facts=4, decoys=2, chatter=2),
    DialogueConfig(length=20, turns=5, chatter=2),
    RecallInvisibleConfig(facts=10, questions=3, keys=12, values=9),
]
CASES = [*SMALL, *(config() for config in SYNTHETIC)]
TIGHT = [
    RecallConfig(length=5, facts=1, decoys=0),
    RecallConfig(length=44, fewest=8, decoys=6),
    NeedleConfig(length=5),
    OverwriteConfig(length=38, variables=12, writes=12),
    QuestionsConfig(length=5, facts=1, decoys=0, chatter=0),
    DialogueConfig(length=4, turns=1, chatter=0, quotes=0),
    RecallInvisibleConfig(facts=1, questions=1, keys=1, values=1),
]
WIDTH = {"dialogue": 2, "recall_invisible": 1}
"""Tokens of what is needed together; 3 elsewhere."""
FACTS = [case for case in CASES + TIGHT if case.name != "dialogue"]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_contexts_of_a_batch_end_together(case):
    batch = case.batch("train", 0, 0, 3)
    assert batch.end == case.length and (batch.input_ids[:, batch.end - 1] == SEP).all()
    ragged = replace(batch, context_end=batch.context_end + torch.tensor([0, 1, 0]))
    with pytest.raises(UserError, match="end at different places"):
        ragged.end  # noqa: B018 - asking is the test


def named(case) -> str:
    return f"{case.name}-{case.length}"


def answer_of(task, batch: TaskBatch, row: int, position: int, readable: torch.Tensor) -> int | None:
    """What a reader of the readable tokens of the context answers to the token at `position`; the last fact counts."""
    ids, asked, answer = batch.input_ids[row].tolist(), int(batch.input_ids[row, position]), None
    seen = [token if ok else None for token, ok in zip(ids, readable[row].tolist(), strict=True)]
    for at in range(int(batch.context_end[row]) - 1):
        if task.name == "dialogue" and seen[at] == RULE and seen[at + 1] is not None:
            rule = seen[at + 1] - task.symbols.vocab_size
            answer = task.symbols.first_value + rule * task.keys + asked - SPECIAL
        elif task.name == "recall_invisible" and (seen[at] or 0) >= task.symbols.first_filler:
            key, value = divmod(seen[at] - task.symbols.first_filler, task.values)
            answer = task.symbols.first_value + value if key == asked - SPECIAL else answer
        elif seen[at] == FACT and seen[at + 1] == asked and seen[at + 2] is not None:
            answer = seen[at + 2]
    return answer


def wrong(task, batch: TaskBatch, readable: torch.Tensor) -> list[tuple[int, int]]:
    """(row, question) that such a reader gets wrong."""
    counted = (batch.questions >= 0).nonzero().tolist()
    return [
        (row, int(batch.questions[row, position]))
        for row, position in counted
        if answer_of(task, batch, row, position, readable) != batch.answers[row, position]
    ]


def leaks(batch: TaskBatch) -> list[tuple[int, int]]:
    """(row, position) of questions that were asked before in the same row, so that the answer stands there."""
    found = []
    for row, position in (batch.questions >= 0).nonzero().tolist():
        before = batch.input_ids[row, int(batch.context_end[row]) : position].tolist()
        if int(batch.input_ids[row, position]) in before:
            found.append((row, position))
    return found


@pytest.mark.parametrize("task", CASES + TIGHT, ids=named)
def test_a_batch_has_the_shape_it_promises(task):
    batch = task.batch("train", 0, 0, 16)
    column = torch.arange(batch.input_ids.shape[1])
    after = column >= batch.context_end[:, None]
    assert batch.input_ids.min() >= 0 and batch.input_ids.max() < task.vocab_size
    assert (batch.context_end == task.length).all()
    assert torch.equal(batch.position_ids, column.expand_as(batch.input_ids))
    assert (batch.input_ids[:, 0] == START).all() and (batch.input_ids[:, task.length - 1] == SEP).all()
    assert not batch.needed[after].any() and batch.needed.any(1).all()
    assert (batch.answers[~after] == IGNORED).all() and (batch.questions[~after] == -1).all()
    assert ((batch.questions >= 0) == (batch.answers != IGNORED)).all()
    for row in batch.questions:
        asked = row[row >= 0].tolist()
        assert asked and asked == list(range(len(asked)))


@pytest.mark.parametrize("task", CASES, ids=named)
def test_the_same_integers_give_the_same_batch_and_others_another(task):
    def ids(split, seed, index):
        return task.batch(split, seed, index, 8).input_ids

    first = ids("train", 1, 2)
    assert torch.equal(first, ids("train", 1, 2))
    others = [ids(split, seed, index) for split in SPLITS for seed in (1, 2) for index in (1, 2)]
    rows = torch.cat([*others, ids("test", 0, 0)])
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("task", CASES + TIGHT, ids=named)
def test_who_reads_only_what_is_needed_answers_everything(task):
    batch = task.batch("test", 0, 0, 32)
    assert wrong(task, batch, batch.needed) == []


@pytest.mark.parametrize("task", CASES + TIGHT, ids=named)
def test_without_one_needed_token_its_question_cannot_be_answered(task):
    """Read everything but one needed value (or rule): one question of the row is lost, or all that hang on the rule."""
    batch = task.batch("test", 0, 1, 16)
    for row in range(16):
        needed = batch.needed[row].nonzero()[:, 0].tolist()
        width = WIDTH.get(task.name, 3)
        last = needed[width - 1]
        readable = torch.ones_like(batch.needed)
        readable[row, last] = False
        lost = wrong(task, batch, readable)
        assert lost and {where for where, _ in lost} == {row}
        assert len(lost) == (int((batch.questions[row] >= 0).sum()) if task.name == "dialogue" else 1)


@pytest.mark.parametrize("task", SMALL, ids=named)
def test_a_needed_mask_that_is_shifted_by_one_is_found(task):
    batch = task.batch("test", 0, 0, 32)
    assert wrong(task, batch, batch.needed.roll(1, dims=1))
    assert wrong(task, batch, batch.needed.roll(-1, dims=1))


@pytest.mark.parametrize("task", CASES + TIGHT, ids=named)
def test_nothing_is_asked_twice(task):
    assert leaks(task.batch("train", 0, 0, 64)) == []


@pytest.mark.parametrize("task", [SMALL[0], SMALL[3]], ids=named)
def test_a_repeated_question_is_found(task):
    batch = replace_second_question(replace(task, fewest=2).batch("train", 0, 0, 4))
    assert leaks(batch)


def replace_second_question(batch: TaskBatch) -> TaskBatch:
    """Each row asks its first question again in the place of its second."""
    ids, answers = batch.input_ids.clone(), batch.answers.clone()
    for row in range(len(ids)):
        first, second = ((batch.questions[row] == number).nonzero().item() for number in (0, 1))
        ids[row, second : second + 2] = ids[row, first : first + 2]
        answers[row, second] = answers[row, first]
    return replace(batch, input_ids=ids, answers=answers)


@pytest.mark.parametrize("task", FACTS, ids=named)
def test_the_answer_follows_its_question_in_the_row(task):
    batch = task.batch("train", 0, 0, 8)
    row, position = (batch.questions >= 0).nonzero(as_tuple=True)
    assert torch.equal(batch.input_ids[row, position + 1], batch.answers[row, position])


def test_recall_has_as_many_facts_as_it_says_and_decoys_that_nobody_asks_for():
    task = RecallConfig()
    batch = task.batch("train", 0, 0, 256)
    assert torch.equal(batch.needed.sum(1), 3 * batch.difficulty.long())
    assert torch.equal((batch.input_ids == FACT).sum(1), batch.difficulty.long())
    assert ((batch.input_ids == DECOY).sum(1) == task.decoys).all()
    assert set(batch.difficulty.tolist()) == set(range(1, 9))
    row, at = (batch.input_ids == DECOY).nonzero(as_tuple=True)
    decoys = set(zip(row.tolist(), batch.input_ids[row, at + 1].tolist(), strict=True))
    row, at = (batch.questions >= 0).nonzero(as_tuple=True)
    assert not decoys & set(zip(row.tolist(), batch.input_ids[row, at].tolist(), strict=True))


def test_a_batch_moves_to_another_device_whole():
    moved = RecallConfig().batch("train", 0, 0, 2).to("meta")
    tensors = [moved.input_ids, moved.answers, moved.questions, moved.context_end, moved.needed, moved.difficulty]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and moved.attention_mask is None


def test_a_fact_lies_anywhere_and_is_asked_at_any_time():
    """No position is favoured, and the order of the questions is not that of the facts: a policy can use neither."""
    task = RecallConfig(fewest=8)
    batch = task.batch("train", 0, 0, 512)
    place = (batch.input_ids == FACT).nonzero()[:, 1]
    assert place.min() == 1 and place.max() == task.length - 4
    assert place.double().mean() == pytest.approx((task.length - 3) / 2, abs=1)
    first = [
        (batch.input_ids[row, : task.length] == batch.input_ids[row, task.length]).nonzero().item()
        for row in range(512)
    ]
    assert sum(first) / 512 == pytest.approx((task.length - 3) / 2 + 1, abs=4)


def test_filler_is_zipf_distributed():
    ids = RecallConfig().batch("train", 0, 0, 2048).input_ids
    count = torch.bincount(ids.flatten() - RecallConfig().symbols.first_filler + 500)[500:]
    assert count[0] / count[1] == pytest.approx(2, rel=0.1) and count[0] / count[9] == pytest.approx(10, rel=0.2)


def test_an_answer_tells_nothing_about_the_next_one():
    """Distinct values would: what is left over could be guessed. Equal neighbours are as frequent as chance."""
    task = RecallConfig(length=26, fewest=2, facts=2, decoys=0, values=4)
    batch = task.batch("train", 0, 0, 4096)
    first, second = (batch.answers[batch.questions == number] for number in (0, 1))
    assert (first == second).float().mean() == pytest.approx(0.25, abs=0.03)


def test_overwrite_asks_for_the_latest_value_and_stale_ones_differ():
    task = OverwriteConfig()
    batch = task.batch("train", 0, 0, 64)
    assert ((batch.input_ids == FACT).sum(1) == task.writes).all()
    assert torch.equal(batch.needed.sum(1), 3 * batch.difficulty.long())
    for row in range(64):
        written: dict[int, list[int]] = {}
        for at in (batch.input_ids[row] == FACT).nonzero()[:, 0].tolist():
            written.setdefault(int(batch.input_ids[row, at + 1]), []).append(int(batch.input_ids[row, at + 2]))
        assert len(written) == batch.difficulty[row]
        assert all(len(set(values)) == len(values) for values in written.values())
        for at in (batch.questions[row] >= 0).nonzero()[:, 0].tolist():
            assert written[int(batch.input_ids[row, at])][-1] == batch.answers[row, at]


@pytest.mark.parametrize("length", [5, 6, 64, 300])
def test_a_needle_lies_where_the_grid_says(length):
    start, middle, end = grid([length], [0, 0.5, 1])
    place = {
        task.depth: task.batch("test", 0, 0, 4).input_ids.eq(FACT).nonzero()[:, 1].tolist()
        for task in (start, middle, end)
    }
    assert place == {0: [1] * 4, 0.5: [1 + round(0.5 * (length - 5))] * 4, 1: [length - 4] * 4}
    drawn = NeedleConfig(length=length).batch("test", 0, 0, 64)
    assert ((drawn.difficulty >= 0) & (drawn.difficulty <= 1)).all()


def test_the_grid_has_every_length_and_depth():
    assert [(task.length, task.depth) for task in grid([16, 32], [0, 1], keys=4)] == [
        (16, 0),
        (16, 1),
        (32, 0),
        (32, 1),
    ]
    assert grid([16], iter([0.5]), keys=4)[0].keys == 4


def test_turns_stand_apart():
    task = QuestionsConfig(chatter=3)
    batch = task.batch("train", 0, 0, 16)
    row, position = (batch.questions >= 0).nonzero(as_tuple=True)
    assert (batch.input_ids[row, position - 4] == TURN).all()
    assert (batch.input_ids[row, position - 1] >= task.symbols.first_filler).all()


def test_no_answer_of_a_dialogue_stands_in_the_row_and_quoted_rules_do_not_count():
    task = DialogueConfig()
    batch = task.batch("train", 0, 0, 64)
    values = (batch.input_ids >= task.symbols.first_value) & (batch.input_ids < task.symbols.first_filler)
    assert not values.any()
    assert ((batch.input_ids == DECOY).sum(1) == task.quotes).all() and (batch.needed.sum(1) == 2).all()
    rules = (batch.answers - task.symbols.first_value).div(task.keys, rounding_mode="floor")
    assert {len(set(row[mask].tolist())) for row, mask in zip(rules, batch.questions >= 0, strict=True)} == {1}


def telling(task) -> tuple[float, float]:
    """By how much (rows of 4096) the odds of being needed differ between positions of a context, and between tokens."""
    batch = task.batch("train", 0, 0, 4096)
    needed = batch.needed[:, 1 : task.length - 1].double()
    ids = batch.input_ids[:, 1 : task.length - 1]
    seen, count = (torch.zeros(task.vocab_size, dtype=torch.float64) for _ in range(2))
    seen.index_add_(0, ids.flatten(), needed.flatten())
    count.index_add_(0, ids.flatten(), torch.ones_like(needed).flatten())
    by_token = (seen / count)[count > 400]
    return tuple(((odds.max() - odds.min()) / needed.mean()).item() for odds in (needed.mean(0), by_token))


def test_nothing_in_an_invisible_context_tells_what_will_be_needed_or_how_much():
    task = RecallInvisibleConfig(facts=16, questions=4, keys=16, values=4)
    assert all(difference < 0.5 for difference in telling(task))
    batch = task.batch("train", 0, 0, 64)
    assert (batch.needed.sum(1) == 4).all() and batch.difficulty is None
    assert (batch.input_ids[:, 1 : task.length - 1] >= task.symbols.first_filler).all()
    # The twin: in recall a token tells, for filler is never needed and FACT always is.
    assert telling(RecallConfig(length=32, facts=3, decoys=2, keys=8, values=8, fillers=8))[1] > 2
