"""How is a whole study run?

Plan, prepare, base models, trials, benchmarks, report; a second start does what is missing.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path

from ctxprune.errors import UserError
from pipelines import cluster, output, store, tracking
from pipelines.config import Config, to_record
from pipelines.decoding_benchmark import run_benchmarks
from pipelines.grid import Trial, expand
from pipelines.machine import machine, versions
from pipelines.preflight import check_cluster, check_model, check_tracking
from pipelines.prepare import Corpora
from pipelines.progress import Bars
from pipelines.report import read_plan, report
from pipelines.study import Steps, collect, publish, steps
from pipelines.worker import Job


def main(config: Config, overrides: list[str]) -> int:
    """The verb: 0 when every trial has a result, 1 when one failed."""
    if config.study.tasks:
        from pipelines.policy_study import run

        return run.main(config, overrides)
    return run_study(config, expand(config, overrides))


def run_study(config: Config, trials: list[Trial], *, beside: bool = False) -> int:
    """Run trials as the sweep config.sweep.name; see the module's question. beside: its plan keeps what it holds."""
    check_tracking(config.tracking)
    check_cluster(config.cluster)
    for asked in {_asked_of_model(trial.config): trial.config for trial in trials}.values():
        check_model(asked)
    with Bars() as bars:
        corpora = Corpora(trials, bars)
        for trial in trials:
            corpora.check_benchmark(trial.config)
        # Up to here a person's mistake has left no trace; from here on the study owns its folder.
        with store.locked(Path(config.runs) / config.sweep.name):
            failures = _study(config, trials, corpora, bars, beside)
    try:
        report(Path(config.runs) / config.sweep.name, json_lines=config.format == "json", out=output.stdout())
    except UserError:
        if not failures:  # else there is nothing to report on: each was said when it failed
            raise
    return 1 if failures else 0


def _asked_of_model(config: Config) -> tuple:
    """What check_model looks at."""
    return config.model.path, config.train.context, config.benchmark.prompt + config.benchmark.new_tokens


def _study(config: Config, trials: list[Trial], corpora: Corpora, bars: Bars, beside: bool) -> dict[str, str]:
    """Everything between the checks and the report; the causes of the trials that failed."""
    folder, here = Path(config.runs) / config.sweep.name, machine()
    plan = [steps(trial, corpora.folder(trial.config), here) for trial in trials]
    _write_plan(folder, plan, beside)
    for line in plan_lines(plan):
        bars.say(line)
    todo = [one for one in plan if one.missing()]
    failures: dict[str, str] = {}
    if any(set(one.missing()) - {"benchmark"} for one in todo):
        with cluster.connected(config.cluster):
            _run(_base_jobs(todo), config, folder, bars, failures)
            first, rest = waves(_trial_jobs(todo, failures, folder, bars), lambda job: job.folder)
            _run(first, config, folder, bars, failures)
            # Of those that are evaluated alike, too, one does it for all; another tries where that one failed.
            while rest := [one for one in rest if not store.finished(one[1].evaluation)]:
                now, rest = waves(_trained(rest, first, failures, folder, bars), lambda job: job.evaluation)
                _run(now, config, folder, bars, failures)

    def failed(one: Steps, error: Exception) -> None:
        cause = f"its benchmark failed: {type(error).__name__}: {error}".splitlines()[0]
        told = "".join(traceback.format_exception(error))
        _fail(one.trial.name, cluster.Failure(cause, told, None), folder, bars, failures)

    run_benchmarks([one for one in plan if not set(one.missing()) - {"benchmark"}], bars, failed)
    for one in plan:
        if not one.missing():
            _finish(one, config, folder, here, bars)
    return failures


def waves(jobs: list, makes: Callable[[Job], Path | None]) -> tuple[list, list]:
    """Jobs that may run together, and those that wait: trials which differ in how they are evaluated or timed share a
    training, that the first of them does, and those that differ in how they are timed an evaluation."""
    first = {makes(job): name for name, job in reversed(jobs)}
    leads = [first[makes(job)] == name for name, job in jobs]
    together = [one for one, leading in zip(jobs, leads, strict=True) if leading]
    return together, [one for one, leading in zip(jobs, leads, strict=True) if not leading]


def _trained(jobs: list, before: list, failures: dict[str, str], folder: Path, bars: Bars) -> list:
    """Those of the jobs whose training is there now; the others are reported. before: the jobs that were to train."""
    ready, first = [], {job.folder: name for name, job in before}
    for name, job in jobs:
        if store.finished(job.folder):
            ready.append((name, job))
            continue
        cause = f"{first[job.folder]}, which trains for it, failed: {failures.get(first[job.folder], 'unknown cause')}"
        _fail(name, cluster.Failure(cause, "", None), folder, bars, failures)
    return ready


def plan_lines(plan: list[Steps]) -> list[str]:
    """The plan for people, before anything runs: a line per trial with the steps it still needs."""
    lines = [f"plan: {len(plan)} trials, {sum(bool(one.missing()) for one in plan)} with work left"]
    width = max(len(one.trial.name) for one in plan)
    for one in plan:
        train = one.trial.config.train
        tokens = train.steps * train.batch * train.context
        need = ", ".join(one.missing()) or "done"
        lines.append(f"  {one.trial.name:<{width}}  {tokens / 1e6:.2f} M tokens  {need}")
    return lines


def _base_jobs(todo: list[Steps]) -> list:
    """The base models still to be trained, each once, largest first."""
    jobs = {one.base.folder: one for one in todo if one.base and not store.finished(one.base.folder)}
    return [(_base_name(one), one.base) for one in _largest_first(list(jobs.values()))]


def _base_name(one: Steps) -> str:
    assert one.base is not None
    return f"base {one.trial.config.model.name} {one.base.folder.name[-8:]}"


def _trial_jobs(todo: list[Steps], failures: dict[str, str], folder: Path, bars: Bars) -> list:
    """The trials still to be trained or evaluated; those whose base model failed are reported and left out."""
    jobs = []
    for one in _largest_first(todo):
        if not set(one.missing()) - {"benchmark"}:
            continue
        if one.base and not store.finished(one.base.folder):
            cause = f"its base model failed: {failures.get(_base_name(one), 'unknown cause')}"
            _fail(one.trial.name, cluster.Failure(cause, "", None), folder, bars, failures)
            continue
        jobs.append((one.trial.name, one.job))
    return jobs


def _largest_first(todo: list[Steps]) -> list[Steps]:
    """Long trials first, so that no core idles at the end: by model size, learned before the rest."""
    return sorted(
        todo,
        key=lambda one: (
            -(one.trial.config.model.layers * one.trial.config.model.width**2),
            one.trial.config.pruning.policy != "learned",
        ),
    )


def _run(jobs: list, config: Config, folder: Path, bars: Bars, failures: dict[str, str]) -> None:
    """Run jobs with a bar over all of them and one for each that is running."""
    if not jobs:
        return
    total = sum(_steps_of(job) for _, job in jobs)
    reached = dict.fromkeys([name for name, _ in jobs], 0)
    sizes = {name: _steps_of(job) for name, job in jobs}
    with bars.task(f"{len(jobs)} training jobs (steps)", total) as advance:

        def watch(name: str, row: dict) -> None:
            if row["kind"] == "train":
                reached[name] = row["step"] + 1
                bars.update(name, row["step"] + 1, sizes[name])
            advance(sum(reached.values()))

        def ended(name: str, failure: cluster.Failure | None) -> None:
            reached[name] = sizes[name]
            bars.close(name)
            advance(sum(reached.values()))
            if failure is None:
                bars.say(f"  done    {name}")
                return
            _fail(name, failure, folder, bars, failures)

        cluster.run_jobs(jobs, config.cluster, watch, ended)


def _steps_of(job) -> int:
    train = job.config["train"]
    return train["base_steps"] if job.kind == "base" else train["steps"]


def _fail(name: str, failure: cluster.Failure, sweep: Path, bars: Bars, failures: dict[str, str]) -> None:
    """Say that a trial or a base model failed, and leave its cause where the report looks for it."""
    failures[name] = failure.cause
    bars.say(f"  FAILED  {name}: {failure.cause}")
    folder = sweep / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "failure.log"
    log.write_text(failure.traceback)
    record = {"trial": name, "cause": failure.cause, "log": str(log), "step": failure.last_step}
    store.write_json(folder / "failure.json", record)


def _finish(one: Steps, config: Config, folder: Path, here: dict, bars: Bars) -> None:
    """result.json of a trial whose steps are all there, and its mirror in W&B; nothing if that was done before."""
    target = folder / one.trial.name
    done = target / "result.json"
    result = collect(one, config.sweep.name, here, versions())
    if done.is_file():
        before = json.loads(done.read_text())
        if {**before, "versions": None} == json.loads(json.dumps({**result, "versions": None})):
            return
    publish(one, target, result)
    tracking.mirror(one.trial.config, config.sweep.name, target, result)


def _write_plan(folder: Path, plan: list[Steps], beside: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trials = [{"trial": one.trial.name, "overrides": one.trial.overrides} for one in plan]
    if beside and (folder / "plan.json").is_file():
        names = [one["trial"] for one in trials]
        trials = [one for one in read_plan(folder)["trials"] if one["trial"] not in names] + trials
    store.write_json(folder / "plan.json", {"sweep": folder.name, "trials": trials})
    for one in plan:
        trial = folder / one.trial.name
        trial.mkdir(exist_ok=True)
        if one.missing() and (trial / "result.json").is_file():
            # Of another text, model, machine or version: not to be taken for the one that is to come.
            (trial / "result.json").replace(trial / "result.before.json")
        _write_yaml(trial / "config.yaml", to_record(one.trial.config))


def _write_yaml(path: Path, record: dict) -> None:
    from omegaconf import OmegaConf

    path.write_text(OmegaConf.to_yaml(OmegaConf.create(record)))
