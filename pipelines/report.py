"""How did the sweep go? Reads what its trials left behind and writes the table, the plots and the page.

A folder may hold a study of policies (points.jsonl), instead of a sweep or beside it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ctxprune.errors import UserError
from pipelines import canvas, losses, page, plots, table
from pipelines.policy_study import page as study
from pipelines.policy_study import table as study_table

log = logging.getLogger(__name__)

POLICIES = ("dense", "learned", "window", "strided")
"""Order of the policies in tables; others follow by name."""

WIDE = 150
"""Columns of the full table; a narrower terminal gets the main columns only."""


def read_plan(folder: Path) -> dict:
    """plan.json of a sweep. UserError where there is no sweep or its plan cannot be read."""
    if not folder.is_dir():
        raise UserError(f"there is no sweep at {folder}: run the sweep first, or check sweep.name and runs")
    if not (folder / "plan.json").is_file():
        raise UserError(
            f"{folder} has neither plan.json nor {study.POINTS}: it is not the folder of a sweep or a study; "
            "run the sweep first, or check sweep.name"
        )
    plan = _read_object(folder / "plan.json")
    trials = plan.get("trials") if plan else None
    if not isinstance(trials, list) or not all(isinstance(t, dict) and isinstance(t.get("trial"), str) for t in trials):
        raise UserError(f"{folder / 'plan.json'} is not a plan of trials: run the sweep again to write it anew")
    return plan


def read_results(folder: Path) -> list[dict]:
    """result.json of every finished trial, unchanged; by model, then dense, learned by target, window, strided."""
    return sorted((result for _, result in _records(folder, "result.json")), key=_order)


def read_failures(folder: Path) -> list[dict]:
    """failure.json of every trial that failed and has not finished since, in the order of the plan."""
    finished = {trial for trial, _ in _records(folder, "result.json")}
    return [{"trial": t, **failure} for t, failure in _records(folder, "failure.json") if t not in finished]


def missing(folder: Path) -> list[str]:
    """The trials of the plan that have neither finished nor failed, in the order of the plan."""
    seen = {trial for name in ("result.json", "failure.json") for trial, _ in _records(folder, name)}
    return [trial["trial"] for trial in read_plan(folder)["trials"] if trial["trial"] not in seen]


def read_training(folder: Path) -> dict[str, list[dict]]:
    """Training rows of metrics.jsonl per trial, by step; of a step logged twice (resumed run), the later row counts."""
    curves = {}
    for trial in (trial["trial"] for trial in read_plan(folder)["trials"]):
        steps: dict[float, dict] = {}
        for row in _read_lines(folder / trial / "metrics.jsonl"):
            step = table.number(row, "step")
            if row.get("kind") == "train" and step is not None:
                steps[step] = row
        if steps:
            curves[trial] = [steps[step] for step in sorted(steps)]
    return curves


def report(folder: Path, *, json_lines: bool, out: TextIO | None = None) -> None:
    """Write `folder/report/` and print the table, or with `json_lines` one result object per line and nothing else.

    `out` is standard output where not given. UserError (one line) if there is no sweep, no plan or no finished trial,
    and no study either.
    """
    out = sys.stdout if out is None else out
    points = study.points(folder)
    if points and not (folder / "plan.json").is_file():
        _report_study(folder, points, json_lines, out)
        return
    plan, results, failures, absent = read_plan(folder), read_results(folder), read_failures(folder), missing(folder)
    if not results:
        raise UserError(_nothing_finished(folder, failures, absent))
    name = str(plan.get("sweep") or folder.name)
    made, curves = table.rows(results), read_training(folder)
    verdict = losses.verdict(made, curves)
    drawn = {
        "perplexity_vs_sparsity": lambda ink: plots.perplexity_vs_sparsity(made, ink),
        "accuracy_vs_throughput": lambda ink: plots.accuracy_vs_throughput(made, ink),
    }
    if plots.has_curves(made, curves):
        drawn["training"] = lambda ink: plots.training(made, curves, ink)

    target = folder / "report"
    target.mkdir(exist_ok=True)
    (target / "training.png").unlink(missing_ok=True)  # it may be gone from the data since the last report
    images = {}
    for plot, draw in drawn.items():
        png, light = canvas.render(draw, canvas.LIGHT, "png", "svg")
        images[plot] = (light, *canvas.render(draw, canvas.DARK, "svg"))
        _write(target / f"{plot}.png", png)
        if plot != "training":
            _write(target / f"{plot}.svg", light)
    _write(target / "table.csv", table.comma_separated(made).encode())
    told = page.markdown(name, results, made, failures, absent, verdict)
    more = ""
    if points:
        more = study.sections(points, _study_plots(target, points))
        told += "\n" + study.markdown(points)
    _write(target / "table.md", told.encode())
    _write(target / "index.html", page.page(name, results, made, failures, absent, images, verdict, more).encode())
    if json_lines:
        _json(results + points, target, out)
        return
    _print(made, failures, absent, target, out)
    if points:
        out.write(study_table.text(points) + "\n")


def _report_study(folder: Path, points: list[dict], json_lines: bool, out: TextIO) -> None:
    target = folder / "report"
    target.mkdir(exist_ok=True)
    images = _study_plots(target, points)
    _write(target / "table.md", study.markdown(points).encode())
    _write(target / "index.html", study.whole(folder.name, points, images).encode())
    if json_lines:
        _json(points, target, out)
    else:
        out.write(f"{study_table.text(points)}\nreport: {target / 'index.html'}\n")


def _study_plots(target: Path, points: list[dict]) -> dict[str, tuple[bytes, bytes]]:
    """Written as PNG; returned as SVG on light and on dark paper."""
    images = {}
    for plot, (png, light, dark) in study.drawn(points).items():
        _write(target / f"{plot}.png", png)
        images[plot] = (light, dark)
    return images


def _json(records: list[dict], target: Path, out: TextIO) -> None:
    out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    log.info("report: %s", target / "index.html")


def _print(made: list[dict], failures: list[dict], absent: list[str], target: Path, out: TextIO) -> None:
    from rich.console import Console

    # A file or a pipe has no width of its own: it gets the whole table.
    console = Console(file=out, highlight=False, markup=False, emoji=False, width=None if out.isatty() else WIDE)
    narrow = console.width < WIDE
    console.print(table.terminal(made, narrow=narrow))
    for sentence in page.headlines(made):
        console.print(sentence, soft_wrap=True)
    for failure in failures:
        console.print(page.failure_line(failure), style="red", soft_wrap=True)
    if absent:
        console.print(page.absent_line(absent), style="yellow", soft_wrap=True)
    if narrow:
        console.print(f"more columns: {target / 'table.md'}", soft_wrap=True)
    console.print(f"report: {target / 'index.html'}", soft_wrap=True)


def _nothing_finished(folder: Path, failures: list[dict], absent: list[str]) -> str:
    state = f"{len(failures)} failed, {len(absent)} not run yet"
    first = f" (first failure: {page.failure_line(failures[0])})" if failures else ""
    return f"{folder} has no finished trial, {state}{first}: run the sweep again, it goes on where it stopped"


def _order(result: dict) -> tuple:
    policy = str(result.get("policy"))
    rank = POLICIES.index(policy) if policy in POLICIES else len(POLICIES)
    numbers = [table.number(result, key) for key in ("sparsity_target", "sparsity", "seed")]
    known = [(value is None, value or 0.0) for value in numbers]
    return (str(result.get("model")), rank, policy, *known, str(result.get("trial")))


def _records(folder: Path, name: str) -> Iterator[tuple[str, dict]]:
    for trial in (trial["trial"] for trial in read_plan(folder)["trials"]):
        path = folder / trial / name
        record = _read_object(path) if path.is_file() else None
        if record is not None:
            yield trial, record


def _read_object(path: Path) -> dict | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): it counts as not there", path, error)
        return None
    return record if isinstance(record, dict) else None


def _read_lines(path: Path) -> Iterator[dict]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the last line of a killed process may be torn
            if isinstance(row, dict):
                yield row


def _write(path: Path, content: bytes) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_bytes(content)
    staged.replace(path)
