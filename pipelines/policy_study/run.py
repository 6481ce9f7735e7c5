"""How is a study of policies run? Small models first, then every point, as Ray tasks; then the clock, alone; then the
table. What is there already is not made again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ctxprune import tasks
from ctxprune.errors import UserError
from pipelines import cluster, compose, output, store
from pipelines.config import Config
from pipelines.machine import machine, versions
from pipelines.policy_study import clock, jobs, plots, table, texts
from pipelines.policy_study.config import StudyConfig
from pipelines.policy_study.methods import Method, named
from pipelines.preflight import check_cluster
from pipelines.progress import Bars


def main(config: Config, overrides: list[str]) -> int:
    """The study: 0 when every point has a result, 1 when one failed."""
    for item in map(compose.parse, overrides):
        if item.is_sweep_override():
            raise UserError(f"{item.input_line}: a study takes lists, e.g. study.shares=[0.5,0.25]")
    methods = checked(config)
    check_cluster(config.cluster)
    root, folder = Path(config.runs) / "store", Path(config.runs) / config.sweep.name
    rows = {name: texts.rows_of(root, config.study, name) for name in config.study.tasks}
    with Bars() as bars, store.locked(folder):
        folder.mkdir(parents=True, exist_ok=True)
        failures = _made(config, rows, methods, root, bars)
        records = collect(config, rows, methods, root)
        if config.study.repeats and records:
            times = clock.timed(config.study, rows, [one for one in methods if not one.whole], root, bars)
            for record in records:
                record |= times.get((record["task"], record["method"], record["share"]), {})
    base = {"kind": "policies", "machine": machine(), "versions": versions()}
    records = [base | record for record in records]
    _write(folder, records)
    if config.format == "json":
        for record in records:
            output.emit(record, "json")
    else:
        output.emit({}, "text", table.text(records))
        output.emit({}, "text", f"table and plots: {folder}")
    return 1 if failures else 0


def checked(config: Config) -> list[Method]:
    """The methods to compare. UserError, before any work, for what cannot be studied."""
    study = config.study
    for name in study.tasks:
        if name not in tasks.TASKS:
            tasks.from_dict({"task": name})  # refuses it, with the nearest
    texts.check(study)
    for name in ("tasks", "shares", "seeds", "methods"):
        listed = getattr(study, name)
        if name in ("shares", "seeds") and not listed:
            raise UserError(f"study.{name} is empty: list at least one")
        for one in listed:
            if listed.count(one) > 1:
                raise UserError(f"study.{name} lists {one} twice: once is enough")
    methods = named(study.methods)
    for name in study.tasks:
        if not possible(name, methods):
            raise UserError(f"study.methods has nothing that is possible for {name}: nobody knows what its texts need")
    return methods


def possible(task: str, methods: list[Method]) -> list[Method]:
    """Those that do not need a truth which the task does not know."""
    return [method for method in methods if not (method.told and texts.from_files(task))]


def by_share(study: StudyConfig, methods: list[Method]) -> list[tuple[float, list[Method]]]:
    """Each share with the methods that are measured at it: what keeps everything has 1 to itself."""
    pruning, whole = ([method for method in methods if method.whole is which] for which in (False, True))
    return [*((share, pruning) for share in study.shares), *([(1.0, whole)] if whole else [])]


def collect(config: Config, rows: dict[str, str | None], methods: list[Method], root: Path) -> list[dict]:
    """A record per finished point, in the order of the table. rows: of each task, see texts."""
    study, records = config.study, []
    for task in study.tasks:
        for share, of_share in by_share(study, methods):
            for method in possible(task, of_share):
                for seed in study.seeds:
                    model = jobs.model_inputs(task, study.steps, seed, rows[task])
                    inputs = jobs.point_of(root, study, model, method.name, share)
                    if store.finished(store.folder_of(root, "study-point", inputs)):
                        records.append(
                            {"task": task, "share": share, "method": method.name, "decides": method.kind}
                            | {"adaptive": method.adaptive, "aware": method.aware, "seed": seed, "rows": inputs["rows"]}
                            | jobs.read_point(root, inputs)
                        )
    return records


def _made(config: Config, rows: dict[str, str | None], methods: list[Method], root: Path, bars: Bars) -> list[str]:
    """Everything that is missing, through Ray; names of what failed."""
    study, failures = config.study, []
    models = [jobs.model_inputs(task, study.steps, seed, rows[task]) for task in study.tasks for seed in study.seeds]
    for task in study.tasks:
        for method in methods:
            if method not in possible(task, methods):
                bars.say(f"left out: {method.name} on {task}, as nobody knows which tokens of its texts are needed")
    points = [
        (f"{model['task']['task']}, seed {model['seed']}: {method.name} at {share:g}", model,
         jobs.point_of(root, study, model, method.name, share))
        for model in models for share, of_share in by_share(study, methods)
        for method in possible(model["task"]["task"], of_share)
    ]  # fmt: skip
    # What is taught takes longest: first, so that no core idles at the end.
    taught = {method.name: method.prepare is None for method in methods}
    points.sort(key=lambda point: taught[point[2]["method"]])
    todo_models = [m for m in models if not store.finished(store.folder_of(root, "study-model", m))]
    todo = [p for p in points if not store.finished(store.folder_of(root, "study-point", p[2]))]
    bars.say(f"plan: {len(models)} small models, {len(points)} points; {len(todo_models)} and {len(todo)} to be made")
    if not todo:
        return []

    def ended(name: str, failure: str | None) -> None:
        if failure is not None:
            failures.append(name)
            bars.say(f"  FAILED  {name}: {failure}")

    cores = replace(config.cluster, gpus_per_worker=0)  # small models are faster there
    with cluster.connected(cores):
        limit = cluster.slots(cores)
        named_models = [(f"model of {m['task']['task']}, seed {m['seed']}", jobs.make_model, m) for m in todo_models]
        with bars.task("small models", max(1, len(named_models))) as advance:
            run_tasks(str(root), named_models, limit, ended, advance)
        ready = [p for p in todo if store.finished(store.folder_of(root, "study-model", p[1]))]
        with bars.task("points", len(ready)) as advance:
            run_tasks(str(root), [(name, jobs.make_point, inputs) for name, _, inputs in ready], limit, ended, advance)
    return failures


def run_tasks(
    root: str,
    work: list[tuple[str, Callable[[str, dict], None], dict]],
    limit: int,
    ended: Callable[[str, str | None], None],
    advance: Callable[[int], None],
) -> None:
    """Run (name, function, inputs) as Ray tasks, `limit` at a time; ended(name, cause or None) for each."""
    import ray

    launch = ray.remote(num_cpus=1, max_retries=1)(_made_there)
    waiting, running, done = list(work), {}, 0
    while waiting or running:
        while waiting and len(running) < limit:
            name, function, inputs = waiting.pop(0)
            running[launch.remote(function.__name__, root, inputs)] = name
        finished, _ = ray.wait(list(running))
        for reference in finished:
            name = running.pop(reference)
            cause = None
            try:
                ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                cause = f"{type(error.cause).__name__}: {error.cause}".splitlines()[0]
            except ray.exceptions.RayError as error:  # the process died without a word
                cause = str(error).strip().splitlines()[-1]
            done += 1
            ended(name, cause)
            advance(done)


def _made_there(name: str, root: str, inputs: dict) -> None:
    """In the worker."""
    getattr(jobs, name)(root, inputs)


def _write(folder: Path, records: list[dict]) -> None:
    """points.jsonl, table.md and the plots."""
    lines = "".join(json.dumps(output.finite(record), allow_nan=False) + "\n" for record in records)
    (folder / "points.jsonl").write_text(lines)
    if records:
        (folder / "table.md").write_text(table.markdown(records))
        for name, content in plots.files(records).items():
            (folder / name).write_bytes(content)
