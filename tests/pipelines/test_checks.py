"""Is every value that makes no sense refused, with the field and what would make sense?"""

from __future__ import annotations

import math
import typing

import pytest

from ctxprune.errors import UserError
from pipelines import checks, compose
from pipelines.config import Config


def changed(settings: dict) -> Config:
    config = Config()
    config.pruning.policy = "dense"
    for name, value in settings.items():
        *path, last = name.split(".")
        part = config
        for step in path:
            part = getattr(part, step)
        setattr(part, last, value)
    return config


MISTAKES = [
    ({"train.steps": 0}, "train.steps=0: give a whole number in [1, 10000000]"),
    ({"train.steps": 10**30}, "train.steps=1000000000000000000000000000000: give a whole number in [1, 10000000]"),
    ({"train.batch": -1}, "train.batch=-1: give a whole number in [1, 65536]"),
    ({"train.context": 7}, "train.context=7: give a whole number in [8, 1048576]"),
    ({"train.learning_rate": math.nan}, "train.learning_rate=nan: give a number in [0, 10]"),
    ({"pruning.alpha_end": math.inf}, "pruning.alpha_end=inf: give a number in [1, 16]"),
    ({"pruning.alpha_start": 0.9}, "pruning.alpha_start=0.9: give a number in [1, 16]"),
    ({"evaluate.tokens": 64}, "evaluate.tokens=64 is fewer than one train.context=256"),
    ({"model.family": "gpt2", "benchmark.prompt": 300}, "positions of a gpt2 from scratch"),
    ({"pruning.policy": "dense", "pruning.sparsity": None, "pruning.freeze_backbone": True}, "nothing to train"),
    ({"pruning.alpha_start": 9.0}, "pruning.alpha_end=8.0 is below pruning.alpha_start=9.0: sharpness only rises"),
    ({"pruning.sparsity": 1.0}, "pruning.sparsity=1.0: give a number in (0, 1)"),
    ({"pruning.sparsity": 0.0}, "pruning.sparsity=0.0: give a number in (0, 1)"),
    ({"pruning.gamma": -0.1}, "pruning.gamma=-0.1: give a number in [0, 1000]"),
    ({"pruning.policy": "lerned"}, "pruning.policy=lerned: choose one of dense, learned, window, strided, random"),
    (
        {"pruning.policy": "dms"},
        "pruning.policy=dms is trained on a task, by `sweep experiment=policies` alone: choose",
    ),
    ({"pruning.policy": "learned"}, "pruning.policy=learned needs pruning.sparsity=S in (0, 1), or pruning.gamma=G"),
    ({"pruning.policy": "window"}, "pruning.policy=window needs pruning.sparsity=S"),
    ({"pruning.policy": "strided", "pruning.gamma": 0.1}, "pruning.policy=strided needs pruning.sparsity=S"),
    ({"pruning.sparsity": 0.5}, "pruning.policy=dense drops nothing: leave pruning.sparsity out"),
    ({"pruning.gamma": 0.5}, "pruning.policy=dense drops nothing: leave pruning.gamma out"),
    (
        {"pruning.policy": "learned", "pruning.sparsity": 0.5, "pruning.gamma": 0.1},
        "pruning.sparsity and pruning.gamma are both set",
    ),
    ({"model.heads": 3}, "model.heads=3 does not divide model.width=128"),
    ({"model.kv_heads": 3}, "model.kv_heads=3 does not divide model.heads=4"),
    ({"model.width": 12}, "gives heads of odd size: llama needs an even size"),
    ({"model.family": "bert"}, "model.family=bert: choose one of llama, gpt2, qwen3, mistral, gpt_neox"),
    ({"model.path": ""}, "model=tiny needs model.path=FOLDER, or a hub id"),
    ({"model.path": "/nowhere/at/all"}, "model.path=/nowhere/at/all: no such folder"),
    ({"train.batch": 7, "cluster.workers": 2}, "train.batch=7 is not divisible by cluster.workers=2: use 6 or 8"),
    ({"train.batch": 1, "cluster.workers": 2}, "train.batch=1 is not divisible by cluster.workers=2: use 2"),
    ({"train.warmup": 0.8}, "train.warmup=0.8 and train.decay=0.3 add up to more than 1"),
    (
        {"evaluate.contexts": [64, 512]},
        "evaluate.contexts holds 512, above train.context=256: use evaluate.contexts=[64]",
    ),
    ({"evaluate.contexts": [1]}, "evaluate.contexts=1: give a whole number in [2, 1048576]"),
    ({"policy.sinks": 200, "policy.recent": 60}, "policy.sinks + policy.recent = 260 protects the whole train.context"),
    ({"engine.offload": True}, "engine.offload=true needs engine.zero=2 or 3, not 0"),
    ({"engine.zero": 4}, "engine.zero=4: give a whole number in [0, 3]"),
    ({"engine.dtype": "float16"}, "engine.dtype=float16: choose one of float32, bfloat16"),
    ({"data.source": "files"}, "data.source=files needs data.path"),
    ({"data.source": "files", "data.path": "/nowhere"}, "data.path=/nowhere: no such file or folder"),
    ({"data.source": "hub"}, "data.source=hub needs data.names"),
    ({"data.path": "mine.txt"}, "data.path is read with data=files alone, and data.source is stdlib: add data=files"),
    ({"data.names": ["a/b"]}, "data.names is read with data.source=hub alone"),
    ({"data.source": "hub", "data.names": ["../x"]}, "data.names holds '../x'"),
    ({"data.held_out": 0.6}, "data.held_out=0.6: give a number in (0, 0.5]"),
    ({"generate.top_p": 0.0}, "generate.top_p=0.0: give a number in (0, 1]"),
    ({"generate.temperature": -1.0}, "generate.temperature=-1.0: give a number in [0, 100]"),
    ({"generate.temperature": math.nan}, "generate.temperature=nan: give a number in [0, 100]"),
    ({"generate.seed": 2**64}, "generate.seed=18446744073709551616: give a whole number in"),
    ({"generate.max_new_tokens": 0}, "generate.max_new_tokens=0: give a whole number in [1, 1048576]"),
    ({"generate.max_live_tokens": 0}, "generate.max_live_tokens=0: give a whole number in [1, 1048576]"),
    ({"generate.alarm_share": 1.0}, "generate.alarm_share=1.0: give a number in (0, 1)"),
    (
        {"generate.alarm_share": 0.5, "generate.max_live_tokens": 9},
        "generate.max_live_tokens does not go with generate.alarm_share: leave one of them out",
    ),
    (
        {"generate.lossless": True, "generate.alarm_share": 0.5},
        "generate.alarm_share does not go with generate.lossless: leave one of them out",
    ),
    ({"feedback.draft": -1}, "feedback.draft=-1: give a whole number in [0, 64]"),
    ({"feedback.temperature": -0.5}, "feedback.temperature=-0.5: give a number in [0, 100]"),
    ({"feedback.loops": ["lossles"]}, "feedback.loops=lossles: choose one of alarm, lossless"),
    ({"feedback.loops": []}, "feedback.loops is empty: list some of alarm, lossless"),
    ({"gradients.parts": ["worthy"]}, "gradients.parts=worthy: choose one of worth, cost"),
    ({"gradients.parts": []}, "gradients.parts is empty: list at least one"),
    ({"gradients.queries": []}, "gradients.queries is empty: list at least one"),
    ({"gradients.queries": [0]}, "gradients.queries=0: give a whole number in [1, 65536]"),
    ({"gradients.lengths": []}, "gradients.lengths is empty: list at least one"),
    (
        {"gradients.queries": [1, 64], "gradients.lengths": [128, 64]},
        "gradients.queries holds 64, no fewer than gradients.lengths=64: lower it",
    ),
    ({"gradients.context": 1}, "gradients.context=1: give a whole number in [2, 1048576]"),
    ({"generate.prompt": "\udcff"}, "generate.prompt holds bytes that are not UTF-8"),
    ({"format": "xml"}, "format=xml: choose one of text, json"),
    ({"tracking.mode": "on"}, "tracking.mode=on: choose one of offline, online, off"),
    ({"tracking.project": "a/b"}, "tracking.project='a/b': use letters, digits"),
    ({"runs": " "}, "runs is empty"),
]


@pytest.mark.parametrize(("settings", "expected"), MISTAKES, ids=[expected[:50] for _, expected in MISTAKES])
def test_a_value_that_makes_no_sense_is_named(settings, expected):
    with pytest.raises(UserError) as raised:
        checks.check(changed(settings))
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


BAD_NAMES = [
    "",
    "..",
    "../x",
    "a/b",
    "a\\b",
    "/a",
    "-a",
    "a\0",
    "a\n",
    "a" * 65,
    "CON",
    "con",
    "nul.x",
    "\u202eabc",
    "a b",
    "é",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=[ascii(name)[:20] for name in BAD_NAMES])
@pytest.mark.parametrize("field", ["sweep.name", "model.name"])
def test_a_name_that_cannot_be_a_folder_is_refused(field, name):
    with pytest.raises(UserError, match=f"{field}=.*use 1 to 64 of a-z 0-9"):
        checks.check(changed({field: name}))


@pytest.mark.parametrize("name", ["a", "demo", "gpt2-0.8_x.y", "0" * 64])
def test_a_plain_name_is_accepted(name):
    checks.check(changed({"sweep.name": name}))


def test_every_number_has_a_range_and_nothing_else_has():
    def numeric(hint) -> bool:
        return bool({int, float} & {hint, *typing.get_args(hint)})

    assert {name for name, hint in compose.settings().items() if numeric(hint)} == set(checks.RANGES)


def test_ends_of_an_interval_count_as_written():
    assert checks._inside(1, "(0, 1]") and not checks._inside(0, "(0, 1]")
    assert checks._inside(2**63 - 1, "[0, 9223372036854775807]") and not checks._inside(
        2**63, "[0, 9223372036854775807]"
    )


def test_the_frame_of_a_sweep_leaves_targets_to_its_trials():
    checks.check(changed({"pruning.policy": "learned"}), trial=False)
    with pytest.raises(UserError, match=r"train\.steps=0"):
        checks.check(changed({"train.steps": 0}), trial=False)


def test_leaves_name_every_setting():
    assert [name for name, _ in checks.leaves(Config())] == list(compose.settings())
