"""Does a study of policies run through Ray, resume, and say what it found? Small enough for seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

import ctxprune
from ctxprune import UserError, tasks
from ctxprune.retrofitting import wrappers
from ctxprune.tasks.scoring import pearson
from pipelines import compose
from pipelines.policy_study import clock, jobs, plots, run, small_model, table
from pipelines.policy_study.measure import measure
from pipelines.policy_study.methods import METHODS, named, restored, retrofitted
from pipelines.policy_study.thresholds import MISSED, settle


def record(method: str, right: float, seed: int = 0, share: float = 0.25, **more) -> dict:
    kind = next(one for one in METHODS if one.name == method)
    base = {"task": "recall", "share": share, "method": method, "decides": kind.kind, "seed": seed, "rows": 8}
    base |= {"adaptive": kind.adaptive, "aware": kind.aware, "right": right, "kept": share, "agreement": right}
    base |= {"precision": 0.5, "recall": 0.5, "kept_and_difficulty": None} | more
    return {"cache": base["kept"]} | base


MADE = [
    *(record("random", right, seed) for seed, right in enumerate((0.2, 0.25, 0.3))),
    *(record("H2O", right, seed) for seed, right in enumerate((0.8, 0.85, 0.9))),
    *(record("agent", right, seed) for seed, right in enumerate((0.97, 0.99, 0.98))),
    *(record("oracle", 1.0, seed) for seed in range(3)),
]


def test_who_wins_is_said_by_all_seeds():
    (line,) = table.verdicts(table.rows(MADE))
    assert "agent (0.980)" in line and "H2O (0.850)" in line and "every seed of the first above" in line
    worse = [row | {"right": 0.5} if row["method"] == "agent" else row for row in MADE]
    assert "does NOT win" in table.verdicts(table.rows(worse))[0]
    closer = [row | {"right": 0.95} if row["method"] == "H2O" and row["seed"] == 2 else row for row in MADE]
    assert "every seed of the first above" in table.verdicts(table.rows(closer))[0]
    overlapping = [row | {"right": 0.975} if row["method"] == "H2O" and row["seed"] == 2 else row for row in MADE]
    assert "overlap" in table.verdicts(table.rows(overlapping))[0]


def test_what_has_seen_the_questions_is_marked_and_never_wins():
    assert "oracle*" in table.text(MADE) and "oracle" not in table.verdicts(table.rows(MADE))[0]


def test_a_missed_budget_is_said():
    rows = table.rows([record("agent", 0.9, kept=0.26), record("H2O", 0.8, kept=0.2512)])
    assert table.unfair(rows) == ["recall at 0.25: agent kept 0.260"]
    assert table.unfair(table.rows([record("learned gates", 0.9, cache=0.281)]))  # the keys are, the bytes are not
    assert "budget missed: recall at 0.25: agent" in table.text([record("agent", 0.9, kept=0.26)])
    rows = table.rows([record("agent", 0.9, seed, kept=kept) for seed, kept in enumerate((0.26, 0.25, 0.24))])
    assert table.unfair(rows) == ["recall at 0.25: agent kept 0.260 with one seed, 0.250 in the mean"]


def test_the_table_and_plots_hold_every_method():
    timed = [row | {"token_of_dense": 0.9, "read_of_dense": 1.2, "cache": 0.3, "deciding_ms": 1.0} for row in MADE]
    page, drawn = table.markdown(timed), plots.files(timed)
    for method in ("random", "H2O", "agent"):
        assert page.count(f"| {method} |") == 1
    assert "| 0.300 |" in page and "1.0 ms" in page
    assert set(drawn) == {"answers_vs_kept.png", "answers_vs_bytes.png", "answers_vs_time.png"}
    assert all(content.startswith(b"\x89PNG") for content in drawn.values())
    assert set(plots.files(MADE)) == {"answers_vs_kept.png", "answers_vs_bytes.png"}


def test_a_length_from_which_on_a_way_is_no_slower_is_said_or_that_there_is_none():
    lengths = [96, 256, 1024]
    assert clock.since(lengths, [False, False, False]) == 96
    assert clock.since(lengths, [True, False, False]) == 256
    assert clock.since(lengths, [False, True, False]) == 1024  # once below by chance is not from there on
    assert clock.since(lengths, [False, False, True]) is None
    page = table.markdown([record("H2O", 0.8, even_from=1024.0), record("SnapKV", 0.8, even_from=None, repaid=17.0)])
    assert "| 1,024 |" in page and "| none | 17 |" in page
    assert "| none |" not in table.markdown(MADE)


def test_what_reading_lost_is_won_back_by_tokens_that_are_faster_or_never():
    assert clock.repaid(lost=5.0, won=2.0) == 3 and clock.repaid(lost=-1.0, won=0.5) == 0
    assert clock.repaid(lost=5.0, won=0.0) is None and clock.repaid(lost=-1.0, won=-0.5) is None


@pytest.fixture(scope="module")
def subject():
    """A small recall task and a model that half knows it."""
    task = tasks.RecallConfig(length=32, facts=3, decoys=2, keys=8, values=8, fillers=8)
    return task, small_model.train(task, steps=60, seed=0, batch=16).state_dict()


def model_of(subject):
    task, weights = subject
    model = small_model.build(task.vocab_size, small_model.Shape(), 0)
    model.load_state_dict(weights)
    return model.eval()


QUICK = [method for method in METHODS if method.prepare is None]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_method_is_the_same_policy_each_time_it_is_asked_for(method):
    """A worker asks for many points one after the other: what one takes must not be gone for the next."""
    assert method.policy(0.25) == method.policy(0.25)


def test_spread_budgets_are_spread():
    by_name = {method.name: method.policy(0.25) for method in METHODS}
    assert by_name["PyramidKV"].budget.pyramid == 0.5 and by_name["Ada-KV"].budget.head_floor == 0.2
    assert by_name["Ada-KV"].apart and not by_name["SnapKV"].apart


@pytest.mark.parametrize("method", QUICK, ids=lambda method: method.name)
def test_every_untaught_method_meets_its_budget(method, subject):
    task = subject[0]
    model = retrofitted(method, model_of(subject), task, 0.25, 0)
    shown = partial(method.shown, share=0.25) if method.shown else None
    found = measure(model, task, 128, prepared=method.around, shown=shown)
    if method.adaptive:
        assert found.kept.mean() == pytest.approx(0.25, abs=0.02) and found.kept.std() > 0
    else:
        assert torch.allclose(found.kept, torch.full_like(found.kept, 8 / 32))


def test_a_threshold_keeps_what_is_asked_and_never_more_on_the_rows_it_is_set_on(subject, monkeypatch):
    monkeypatch.setattr("pipelines.policy_study.thresholds.ROWS", 128)
    task = subject[0]
    model = ctxprune.retrofit(model_of(subject), named(["H2O, threshold"])[0].policy(0.3))
    for split in ("validation", "test"):
        settle(model, task, 0.3, split=split)
        found = measure(model, task, 128, split=split)
        assert (1 - MISSED) * 0.3 <= found.kept.mean() <= 0.3 and found.kept.std() > 0


def test_where_scores_are_tied_the_last_layer_makes_up_for_what_one_threshold_misses(subject, monkeypatch):
    monkeypatch.setattr("pipelines.policy_study.thresholds.ROWS", 128)
    task = subject[0]
    torch.manual_seed(0)
    model = ctxprune.retrofit(model_of(subject), named(["agent"])[0].policy(0.3))
    first, last = (wrapper.rule.ranking for wrapper in wrappers(model))
    with torch.no_grad():
        first.scorer.outer.weight.zero_()  # every token is worth the same: all stay or none

    def kept() -> float:
        return measure(model, task, 128, split="validation").kept.mean().item()

    settle(model, task, 0.3)
    assert first.config.budget != last.config.budget and (1 - MISSED) * 0.3 <= kept() <= 0.3
    last.config = first.config
    assert abs(kept() / 0.3 - 1) > 0.01


def test_the_best_spread_over_depth_costs_no_more_keys(subject, monkeypatch):
    """Slopes for which the layers' parts are no whole numbers of keys."""
    task = subject[0]
    (method,) = named(["H2O, best constant"])
    for slope in (0.25, -0.77):
        monkeypatch.setattr("pipelines.policy_study.methods.SLOPES", (slope,))
        model = retrofitted(method, model_of(subject), task, 0.3, 0)
        found = measure(model, task, 64)
        assert torch.allclose(found.kept, torch.full_like(found.kept, 10 / 32))
        assert {wrapper.rule.ranking.config.budget.pyramid for wrapper in wrappers(model)} == {slope}


def test_a_spread_that_keeps_more_is_not_the_best_constant(subject, monkeypatch):
    """Where one layer would keep less than its protected keys, however much more that answers."""
    task = subject[0]
    (method,) = named(["H2O, best constant"])

    def more_is_better(*args, **kwargs):
        found = measure(*args, **kwargs)
        return replace(found, right=found.kept)

    monkeypatch.setattr("pipelines.policy_study.methods.measure", more_is_better)
    monkeypatch.setattr("pipelines.policy_study.methods.SLOPES", (0.0, 0.9))
    model = retrofitted(method, model_of(subject), task, 0.09, 0)
    assert {wrapper.rule.ranking.config.budget.pyramid for wrapper in wrappers(model)} == {0.0}
    found = measure(model, task, 64)
    assert torch.allclose(found.kept, torch.full_like(found.kept, 3 / 32))


def test_delayed_eviction_is_settled_in_the_weights_and_restored_from_them(subject, monkeypatch):
    """Whatever its heads have learned: keys still go when they came, and a later start finds the same. The first layer
    has one score per token of the vocabulary, so that of an easy task the share is met in steps, from below."""

    def draw(model, task, share, seed):
        with torch.no_grad():
            for wrapper in wrappers(model):
                wrapper.rule.ranking.scorer.keep.weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(seed))

    monkeypatch.setattr("pipelines.policy_study.thresholds.ROWS", 256)
    task, (method,) = subject[0], named(["DMS"])
    model = retrofitted(replace(method, prepare=draw), model_of(subject), task, 0.4, 0)
    found = measure(model, task, 128)
    assert 0.3 < found.kept.mean() < 0.42 and found.kept.std() > 0
    again = measure(restored(method, model_of(subject), 0.4, model.state_dict()), task, 128)
    assert torch.equal(again.kept, found.kept) and torch.equal(again.right, found.right)


def test_what_gates_are_counted_to_keep_is_what_a_cache_holds_when_the_questions_begin(subject):
    """Also where the first question drops it at once."""
    task = subject[0]
    torch.manual_seed(1)
    model = ctxprune.retrofit(model_of(subject), named(["learned gates"])[0].policy(0.5)).eval()
    for wrapper in wrappers(model):
        with torch.no_grad():
            wrapper.rule.gate.beta.fill_(0.5)
            for weights in (wrapper.rule.gate.query.weight, wrapper.rule.gate.key.weight):
                weights.normal_(0.0, 0.5)
    rows, cache = task.batch("test", 0, 0, 32), ctxprune.PrunedCache()
    with torch.inference_mode():
        model(rows.input_ids[:, : rows.end], past_key_values=cache, use_cache=True)
        held = cache.live_tokens().double().mean(0) / rows.end
        model(rows.input_ids[:, rows.end, None], past_key_values=cache, use_cache=True)
        left = (cache.live_tokens().double().mean(0) - 1) / rows.end
    assert torch.allclose(measure(model, task, 32).kept, held)
    assert (left < held).float().mean() > 0.5 and held.max() < 0.9


def test_the_oracle_keeps_what_is_needed_and_its_precision_says_so(subject):
    task = subject[0]
    (method,) = named(["oracle"])
    found = measure(retrofitted(method, model_of(subject), task, 0.5, 0), task, 64, prepared=method.around)
    assert (found.recall == 1.0).all() and pearson(found.precision, found.difficulty) > 0.99


def config_of(tmp_path, *words: str):
    overrides = ["experiment=policies", "study.seeds=[0]", "study.shares=[0.25]", "study.rows=64", "study.steps=20"]
    overrides += ["study.repeats=1", f"runs={tmp_path}", "format=json", *words]
    return compose.compose("sweep", overrides), overrides


@pytest.mark.slow
def test_a_study_runs_through_ray_and_a_second_start_makes_nothing_again(tmp_path, capsys, monkeypatch):
    config, words = config_of(tmp_path, 'study.methods=[random,truncation,"future attention",oracle]')
    monkeypatch.setattr("pipelines.policy_study.methods.LESSONS", 3)
    monkeypatch.setattr(clock, "LENGTHS", (64, 128))  # a context of 96 tokens has no use for the first
    long: list[int] = []
    was = clock._once
    monkeypatch.setattr(clock, "_once", lambda model, rows, around: long.append(rows.end) or was(model, rows, around))
    assert run.main(config, words) == 0
    first = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["method"] for row in first] == ["random", "truncation", "future attention", "oracle"]
    assert set(long) == {96, 128, 24, 32}  # a quarter of each is all that truncation reads
    assert all(row["even_from"] in (96.0, 128.0, None) for row in first)
    assert all(row["repaid"] is None or row["repaid"] >= 0 for row in first)
    assert all(abs(row["kept"] - 0.25) < 0.01 and row["token_of_dense"] > 0 for row in first)
    assert all(row["machine"] and row["versions"]["torch"] and row["against_dense_low"] <= 0 for row in first)
    assert {path.name for path in (tmp_path / "policies").iterdir()} >= {
        "points.jsonl",
        "table.md",
        "answers_vs_kept.png",
    }
    monkeypatch.setattr(run.cluster, "connected", lambda _: pytest.fail("nothing is left to do"))
    assert run.main(config, words) == 0
    second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["right"] for row in first] == [row["right"] for row in second]


@pytest.mark.slow
def test_what_fails_is_said_with_its_cause_and_stops_no_other(tmp_path):
    config, causes = config_of(tmp_path)[0], {}
    work = [("empty", jobs.make_model, {}), ("misspelt", jobs.make_model, {"task": {"task": "recal"}})]
    with run.cluster.connected(config.cluster):
        run.run_tasks(str(tmp_path), work, 1, causes.__setitem__, lambda done: None)
    assert causes["empty"] == "KeyError: 'task'" and "did you mean 'recall'" in causes["misspelt"]


@pytest.mark.parametrize(
    ("words", "named_in_it"),
    [
        (["study.tasks=[recal]"], "did you mean 'recall'"),
        (["study.tasks=[sst2]"], "give study.train_file=FILE"),
        (["study.methods=[h20]"], "nearest: 'H2O'"),
        (["study.shares=[]"], "study.shares is empty"),
        (["study.seeds=[]"], "study.seeds is empty"),
        (["study.seeds=[1,0,1]"], "study.seeds lists 1 twice"),
        (["study.methods=[H2O,H2O]"], "study.methods lists H2O twice"),
        (["study.rows=64,128"], "takes lists"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused_before_any_work(tmp_path, words, named_in_it):
    config, overrides = config_of(tmp_path / "runs", *words)
    with pytest.raises(UserError, match=named_in_it) as caught:
        run.main(config, overrides)
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [["study.shares=[0]"], ["study.shares=[1.0]"], ["study.rows=0"], ["study.steps=0"]])
def test_budgets_out_of_range_are_refused(tmp_path, words):
    with pytest.raises(UserError, match=words[0].partition("=")[0]):
        config_of(tmp_path, *words)
