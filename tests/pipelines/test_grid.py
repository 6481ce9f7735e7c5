"""Does a sweep hold exactly the trials its lines and the command line ask for?"""

from __future__ import annotations

import pytest

from ctxprune.errors import UserError
from pipelines import grid
from pipelines.compose import compose


def expand(*words: str) -> list[grid.Trial]:
    return grid.expand(compose("sweep", list(words)), list(words))


def lines(*trials: str) -> str:
    return "sweep.trials=[" + ",".join(f'"{trial}"' for trial in trials) + "]"


def points(trials: list[grid.Trial]) -> list[tuple]:
    return [(t.config.model.name, t.config.pruning.policy, t.config.pruning.sparsity) for t in trials]


def test_each_line_is_a_product_of_its_lists():
    found = points(
        expand(lines("model=tiny,small pruning=dense", "pruning=window,strided pruning.sparsity=choice(0.5,0.8)"))
    )
    assert found == [
        ("tiny", "dense", None),
        ("small", "dense", None),
        ("tiny", "window", 0.5),
        ("tiny", "window", 0.8),
        ("tiny", "strided", 0.5),
        ("tiny", "strided", 0.8),
    ]


def test_a_range_counts_like_pythons():
    assert [t.config.train.seed for t in expand(lines("train.seed=range(0,3)"))] == [0, 1, 2]


def test_a_typed_setting_replaces_it_where_a_line_has_it_and_only_there():
    trials = expand(lines("pruning=dense", "pruning=learned pruning.sparsity=0.5,0.8"), "pruning.sparsity=0.25")
    assert points(trials) == [("tiny", "dense", None), ("tiny", "learned", 0.25)]


def test_a_typed_list_replaces_the_list_of_a_line():
    trials = expand(lines("pruning=learned pruning.sparsity=0.5,0.8"), "pruning.sparsity=0.1,0.2,0.3")
    assert [t.config.pruning.sparsity for t in trials] == [0.1, 0.2, 0.3]


def test_a_typed_list_that_no_line_has_multiplies_all_trials():
    trials = expand(lines("pruning=dense", "pruning=window pruning.sparsity=0.5"), "train.seed=0,1")
    assert [(t.config.pruning.policy, t.config.train.seed) for t in trials] == [
        ("dense", 0),
        ("dense", 1),
        ("window", 0),
        ("window", 1),
    ]


def test_a_typed_value_holds_for_all_trials():
    assert {t.config.train.steps for t in expand("experiment=smoke", "train.steps=7")} == {7}


def test_equal_trials_are_merged_however_they_are_written():
    trials = expand(lines("pruning=learned pruning.gamma=0.3,0.30", "model=tiny pruning=learned pruning.gamma=3e-1"))
    assert len(trials) == 1


def test_a_name_says_what_the_trial_is():
    learned, weighted = expand(lines("pruning=learned pruning.sparsity=0.8", "pruning=learned pruning.gamma=0.15"))
    assert learned.name.startswith("tiny-learned-0.8-") and len(learned.name) == len("tiny-learned-0.8-") + 8
    assert weighted.name.startswith("tiny-learned-g0.15-")


def test_a_name_depends_on_the_result_alone(tmp_path):
    (plain,) = expand(lines("pruning=dense"))
    same = [
        "format=json",
        f"runs={tmp_path}",
        "tracking=off",
        "sweep.name=other",
        "cluster.concurrency=3",
        "generate.seed=4",
    ]
    assert [t.name for t in expand(lines("pruning=dense"), *same)] == [plain.name]
    for other in ("train.seed=1", "policy=protected", "engine=zero1", "cluster.workers=2", "benchmark.repeats=5"):
        assert expand(lines("pruning=dense"), other)[0].name != plain.name, other


@pytest.mark.parametrize("experiment", ["demo", "smoke"])
def test_train_with_a_trials_overrides_is_that_trial(experiment):
    for trial in expand(f"experiment={experiment}", "model=tiny")[::2]:
        assert grid.trial_hash(compose("train", trial.overrides)) == grid.trial_hash(trial.config)


def test_no_lines_is_one_trial():
    assert points(expand("sweep.trials=[]")) == [("tiny", "dense", None)]


def test_the_retrofit_needs_only_a_model_and_a_text(tmp_path):
    trials = expand("experiment=retrofit", f"model.path={tmp_path}", f"data.path={tmp_path}")
    assert len(trials) == 8 and {t.config.model.path for t in trials} == {str(tmp_path)}


def test_the_paper_sweeps_gamma_with_its_recipe():
    trials = expand("experiment=paper", "model=gpt2")
    assert {t.config.pruning.policy for t in trials} == {"dense", "learned", "window", "strided"}
    one = next(t.config for t in trials if t.config.pruning.policy == "learned")
    assert (one.train.steps, one.train.batch, one.train.context) == (25000, 6, 1024)
    assert one.train.warmup * one.train.steps == 2000 and one.train.clip == one.train.decay == 0
    assert one.train.learning_rate == one.train.gate_learning_rate == 1e-4
    assert (one.pruning.rank, one.pruning.beta, one.pruning.alpha_end, one.pruning.alpha_steps) == (64, 2.0, 8.0, 1.0)


MISTAKES = [
    ([lines("pruning=learned")], "trial '.*pruning=learned': pruning.policy=learned needs"),
    ([lines("pruning=dense"), "pruning=window"], "trial '.*pruning=window': pruning.policy=window needs"),
    ([lines("model=tiny 'x")], "No closing quotation"),
    ([lines("modle=tiny")], 'no setting "modle"; nearest: model'),
    ([lines("runs=x")], "belongs to the whole sweep"),
    ([lines("experiment=smoke")], "belongs to the whole sweep"),
    ([lines("cluster.workers=2")], "belongs to the whole sweep"),
    (["cluster.workers=1,2"], "a sweep has one cluster.workers"),
    (["sweep.name=a,b"], "a sweep has one sweep.name"),
    (["tracking=off,online"], "a sweep has one tracking"),
    (["train.seed=range(0,100)", "train.batch=range(1,100)"], "more than 1000 trials"),
    (["train.seed=range(0,10000000000)"], "more than 1000 values"),
    (["train.seed=range(0,0)"], "an empty list of values"),
    (["experiment=retrofit"], "needs model.path|needs data.path"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=[" ".join(words)[:50] for words, _ in MISTAKES])
def test_a_sweep_that_makes_no_sense_is_refused(words, expected):
    with pytest.raises(UserError, match=expected) as raised:
        expand(*words)
    assert "\n" not in str(raised.value)
