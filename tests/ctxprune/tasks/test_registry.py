"""Does every task come back from plain values, and does every mistake in them say what to give?"""

from __future__ import annotations

import json
from functools import partial

import pytest

from ctxprune.errors import UserError
from ctxprune.tasks import FROM_FILES, SYNTHETIC, TASKS, from_dict, to_dict
from ctxprune.tasks.multi30k import Multi30kConfig
from ctxprune.tasks.needle import NeedleConfig
from ctxprune.tasks.recall import RecallConfig
from ctxprune.tasks.task import stream

PATHS = {"file": "a.en", "tokenizer": "b"}


@pytest.mark.parametrize("config", SYNTHETIC + FROM_FILES, ids=lambda config: config.name)
def test_a_task_comes_back_from_json(config):
    task = config(**(PATHS if config in FROM_FILES else {}))
    assert from_dict(json.loads(json.dumps(to_dict(task)))) == task
    assert TASKS[config.name] is config


@pytest.mark.parametrize(
    "values, says",
    [
        ({"task": "recal"}, "unknown task 'recal': did you mean 'recall'?"),
        (
            {"task": "zzz"},
            "unknown task 'zzz': choose one of recall, needle, overwrite, questions, dialogue, recall_invisible, cl",
        ),
        ({}, "unknown task None: choose one of"),
        ({"task": "recall", "decoy": 1}, "task recall has no setting 'decoy': did you mean 'decoys'?"),
        ({"task": "needle", "qqq": 1}, "task needle has no setting 'qqq': choose one of length, depth"),
        ({"task": "recall", "fewest": 0}, "recall: fewest is 0: give at least 1"),
        ({"task": "recall", "facts": 2, "fewest": 3}, "recall: facts is 2: give at least 3"),
        ({"task": "recall", "decoys": -1}, "recall: decoys is -1: give at least 0"),
        ({"task": "recall", "keys": 13}, "recall: keys is 13: give at least 14"),
        ({"task": "recall", "values": 0}, "recall: values is 0: give at least 1"),
        ({"task": "recall", "length": 43}, "recall: length is 43, too short for what stands in it: give 44"),
        ({"task": "questions", "chatter": -1}, "questions: chatter is -1: give at least 0"),
        ({"task": "questions", "length": 3}, "questions: length is 3, too short for what stands in it: give 44"),
        ({"task": "needle", "length": 4}, "needle: length is 4, too short for what stands in it: give 5"),
        ({"task": "needle", "depth": 1.5}, "needle: depth is 1.5: give 0 to 1, or none for anywhere"),
        ({"task": "overwrite", "writes": 5}, "overwrite: writes is 5: give at least 6"),
        ({"task": "overwrite", "values": 11}, "overwrite: values is 11: give at least 12"),
        ({"task": "overwrite", "length": 37}, "overwrite: length is 37, too short for what stands in it: give 38"),
        ({"task": "dialogue", "rules": 1}, "dialogue: rules is 1: give at least 2"),
        ({"task": "dialogue", "turns": 13}, "dialogue: keys is 12: give at least 13"),
        ({"task": "dialogue", "length": 7}, "dialogue: length is 7, too short for what stands in it: give 8"),
        ({"task": "recall_invisibel"}, "unknown task 'recall_invisibel': did you mean 'recall_invisible'?"),
        ({"task": "recall_invisible", "facts": 7}, "recall_invisible: facts is 7: give at least 8"),
        ({"task": "recall_invisible", "keys": 63}, "recall_invisible: keys is 63: give at least 64"),
        ({"task": "recall_invisible", "questions": 0}, "recall_invisible: questions is 0: give at least 1"),
        ({"task": "sst2"}, "sst2: file is empty: give a path"),
        ({"task": "sst2", "file": "a"}, "sst2: tokenizer is empty: give a path"),
        ({"task": "sst2", **PATHS, "form": "both"}, "sst2: form is 'both': give decoder or encoder"),
        ({"task": "dialogsum", **PATHS, "form": "encoder"}, "dialogsum: form is 'encoder': give decoder"),
        ({"task": "wnut17", **PATHS, "max_tokens": 3}, "wnut17: max_tokens is 3: give at least 4"),
        ({"task": "multi30k", **PATHS, "target": "en"}, "multi30k: target is 'en': give a suffix other than that of"),
    ],
)
def test_a_mistake_is_answered_in_one_line(values, says):
    with pytest.raises(UserError) as error:
        from_dict(values)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, says",
    [(("valid", 0, 0), "split is 'valid'"), (("test", -1, 0), "seed is -1"), (("test", 0, -1), "index is -1")],
)
def test_a_stream_wants_a_split_and_numbers_from_0(arguments, says):
    for draw in (stream, partial(RecallConfig().batch, size=2), partial(NeedleConfig().batch, size=2)):
        with pytest.raises(UserError, match=says):
            draw(*arguments)


def test_a_translation_needs_two_suffixes():
    with pytest.raises(UserError, match="give a suffix other than that of 'captions'"):
        Multi30kConfig(file="captions", tokenizer="t")
