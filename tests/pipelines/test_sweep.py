"""Does a sweep keep apart what failed, what shares a training and what is old? Without training anything."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from ctxprune import UserError
from pipelines import decoding_benchmark, store, sweep
from pipelines.compose import compose
from pipelines.decoding_benchmark import run_benchmarks
from pipelines.grid import expand


class Quiet:
    """Bars that show nothing."""

    def task(self, *_):
        return nullcontext(lambda done: None)

    say = staticmethod(lambda line: None)


def job(folder: str) -> SimpleNamespace:
    return SimpleNamespace(folder=Path(folder))


def test_trials_that_share_a_training_do_not_train_side_by_side():
    jobs = [("a", job("1")), ("b", job("2")), ("c", job("1")), ("d", job("1"))]
    together, later = sweep.waves(jobs, lambda job: job.folder)
    assert [name for name, _ in together] == ["a", "b"] and [name for name, _ in later] == ["c", "d"]


def test_trials_that_share_an_evaluation_too_are_not_evaluated_side_by_side():
    one, other, third = (SimpleNamespace(folder=Path("1"), evaluation=Path(name)) for name in ("a", "b", "b"))
    first, rest = sweep.waves([("one", one), ("other", other), ("third", third)], lambda job: job.folder)
    now, later = sweep.waves(rest, lambda job: job.evaluation)
    assert [[name for name, _ in jobs] for jobs in (first, now, later)] == [["one"], ["other"], ["third"]]


def test_who_waited_for_a_training_that_failed_is_told_so(tmp_path):
    def done(name: str) -> SimpleNamespace:
        store.ensure(tmp_path / "store", "train", {"of": name}, lambda staged: None)
        return job(store.folder_of(tmp_path / "store", "train", {"of": name}))

    before = [("a", done("a")), ("b", job(tmp_path / "store" / "train-b"))]
    failures = {"b": "out of memory"}
    ready = sweep._trained([("c", before[0][1]), ("d", before[1][1])], before, failures, tmp_path, Quiet())
    assert [name for name, _ in ready] == ["c"]
    assert failures["d"] == "b, which trains for it, failed: out of memory"
    assert json.loads((tmp_path / "d" / "failure.json").read_text())["cause"] == failures["d"]


def test_one_benchmark_that_fails_stops_no_other(tmp_path, monkeypatch):
    def measured(one, staged):
        if one.trial.name == "large":
            raise MemoryError("no room")

    monkeypatch.setattr(decoding_benchmark, "_one", measured)
    ready = []
    for name in ("large", "small"):
        inputs = {"of": name}
        folder = store.folder_of(tmp_path / "store", "benchmark", inputs)
        trial = SimpleNamespace(name=name, config=SimpleNamespace(runs=str(tmp_path)))
        ready.append(SimpleNamespace(trial=trial, benchmark=folder, benchmark_inputs=inputs))
    failed: list[tuple[str, str]] = []
    for _ in range(2):
        run_benchmarks(ready, Quiet(), lambda one, error: failed.append((one.trial.name, str(error))))
    assert failed == [("large", "no room")] * 2 and store.finished(ready[1].benchmark)


def planned(folder: Path, name: str, missing: list[str]) -> SimpleNamespace:
    (trial, *_) = expand(compose("sweep", ["experiment=smoke"]), ["experiment=smoke"])
    trial.name = name
    return SimpleNamespace(trial=trial, missing=lambda: missing)


def test_an_old_result_is_not_taken_for_one_that_is_to_come(tmp_path):
    for name in ("same", "changed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text("{}")
    sweep._write_plan(tmp_path, [planned(tmp_path, "same", []), planned(tmp_path, "changed", ["train"])], False)
    assert (tmp_path / "same" / "result.json").is_file()
    assert [path.name for path in sorted((tmp_path / "changed").iterdir())] == ["config.yaml", "result.before.json"]


@pytest.mark.parametrize("beside", [False, True])
def test_a_trial_run_alone_joins_the_plan_of_its_sweep(tmp_path, beside):
    sweep._write_plan(tmp_path, [planned(tmp_path, "one", []), planned(tmp_path, "two", [])], False)
    sweep._write_plan(tmp_path, [planned(tmp_path, "two", [])], beside)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [one["trial"] for one in plan["trials"]] == (["one", "two"] if beside else ["two"])


@pytest.mark.parametrize("failures", [{}, {"a": "out of memory"}])
def test_a_sweep_whose_trials_all_failed_is_no_mistake_of_a_person(tmp_path, monkeypatch, failures):
    def nothing(*_, **__):
        raise UserError("nothing to report")

    monkeypatch.setattr(sweep, "Corpora", lambda *_: None)
    monkeypatch.setattr(sweep, "_study", lambda *_: failures)
    monkeypatch.setattr(sweep, "report", nothing)
    config = compose("sweep", ["experiment=smoke", f"runs={tmp_path}"])
    if failures:
        assert sweep.run_study(config, []) == 1
    else:
        with pytest.raises(UserError, match="nothing to report"):
            sweep.run_study(config, [])
