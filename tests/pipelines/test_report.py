"""Does a report say exactly what the trials left behind, whole sweep or half of one?"""

from __future__ import annotations

import csv
import io
import json
import logging

import pytest

from ctxprune.errors import UserError
from pipelines import canvas
from pipelines.report import missing, read_failures, read_results, read_training, report
from tests.results import whole


def write_sweep(folder, results, failures=(), absent=(), curves=()):
    names = [record["trial"] for record in (*results, *failures)] + list(absent)
    for name, records in (("result.json", results), ("failure.json", failures)):
        for record in records:
            (folder / record["trial"]).mkdir(parents=True, exist_ok=True)
            (folder / record["trial"] / name).write_text(json.dumps(record))
    for trial in curves:
        rows = [
            {"kind": "train", "step": s, "loss": 3 - s / 100, "sparsity": 0.1, "sparsity_goal": 0.2} for s in (1, 2, 3)
        ]
        (folder / trial / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(
        json.dumps({"sweep": folder.name, "trials": [{"trial": t, "overrides": {}} for t in dict.fromkeys(names)]})
    )
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Every picture is one byte: for tests of everything around the pictures."""
    monkeypatch.setattr(canvas, "render", lambda draw, ink, *kinds: [b"." for _ in kinds])


@pytest.fixture
def sweep(tmp_path):
    results = [
        whole("s8", policy="strided", perplexity=14.0),
        whole("w8", policy="window", perplexity=13.0),
        whole("l9", target=0.9, perplexity=12.9),
        whole("l8", perplexity=12.3),
        whole("d", policy="dense", target=None, perplexity=12.0),
        whole("big-d", model="big", policy="dense", target=None, perplexity=8.0),
    ]
    failure = {"trial": "w9", "cause": "out of memory", "log": "runs/demo/w9/log.txt", "step": 40}
    return write_sweep(tmp_path / "demo", results, [failure], ["s9"], curves=["l8", "d"])


def test_results_come_by_model_then_dense_learned_by_target_window_strided(sweep):
    assert [r["trial"] for r in read_results(sweep)] == ["big-d", "d", "l8", "l9", "w8", "s8"]


def test_each_planned_trial_is_finished_failed_or_missing_exactly_once(sweep):
    finished = [r["trial"] for r in read_results(sweep)]
    failed = [f["trial"] for f in read_failures(sweep)]
    planned = [t["trial"] for t in json.loads((sweep / "plan.json").read_text())["trials"]]
    assert sorted(finished + failed + missing(sweep)) == sorted(planned)
    assert (failed, missing(sweep)) == (["w9"], ["s9"])


def test_a_trial_that_finished_after_a_failure_counts_as_finished(sweep):
    (sweep / "w9" / "result.json").write_text(json.dumps(whole("w9", policy="window", target=0.9)))
    assert read_failures(sweep) == []
    assert "w9" in [r["trial"] for r in read_results(sweep)]


def test_every_file_is_written_whole_and_a_second_report_replaces_it_byte_for_byte(sweep):
    contents = []
    for _ in range(2):
        report(sweep, json_lines=False, out=io.StringIO())
        contents.append({path.name: path.read_bytes() for path in (sweep / "report").iterdir()})
    plots = {
        f"{plot}.{kind}" for plot in ("perplexity_vs_sparsity", "accuracy_vs_throughput") for kind in ("png", "svg")
    }
    assert set(contents[0]) == plots | {"table.md", "table.csv", "index.html", "training.png"}
    assert all(content[1:4] == b"PNG" for name, content in contents[0].items() if name.endswith(".png"))
    assert contents[0] == contents[1]


def test_slower_training_of_a_learned_trial_reaches_the_page(sweep, undrawn):
    for trial, speed in (("l8", 50.0), ("d", 100.0)):
        with (sweep / trial / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps({"kind": "train", "step": 9, "loss": 1.0, "tokens_per_second": speed}) + "\n")
    report(sweep, json_lines=True, out=io.StringIO())
    for name in ("index.html", "table.md"):
        said = (sweep / "report" / name).read_text()
        assert "learned trains at 0.50x the speed of dense (50.00 against 100.00 tokens/s)" in said


def test_a_study_in_the_folder_of_a_sweep_is_shown_on_the_same_page(sweep, undrawn):
    point = {"task": "recall", "share": 0.25, "method": "agent", "decides": "reward", "adaptive": True, "aware": False}
    (sweep / "points.jsonl").write_text(json.dumps(point | {"right": 0.9, "kept": 0.3, "cache": 0.3}) + "\n")
    out = io.StringIO()
    report(sweep, json_lines=False, out=out)
    html = (sweep / "report" / "index.html").read_text()
    assert html.index("Where learned pruning does not win") < html.index("Ways to prune at equal budgets")
    assert "agent missed its budget: it kept 0.300 of the bytes, 20.0% more than asked." in html
    assert "1.025x" in out.getvalue() and "recall, 0.25 of the context" in out.getvalue()


def test_the_terminal_shows_the_table_the_failure_and_what_is_missing(sweep, undrawn):
    out = io.StringIO()
    report(sweep, json_lines=False, out=out)
    shown = out.getvalue()
    assert "1.025x" in shown  # 12.3 / 12.0, the same model's dense
    assert "w9 failed at step 40: out of memory (log: runs/demo/w9/log.txt)" in shown
    assert "1 of the planned trials has not finished: s9" in shown


def test_json_lines_are_exactly_the_result_objects(sweep, undrawn, capsys, caplog):
    with caplog.at_level(logging.INFO):
        report(sweep, json_lines=True)
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == read_results(sweep)
    assert "index.html" in caplog.text


def test_the_csv_holds_the_numbers_of_the_results(sweep, undrawn):
    report(sweep, json_lines=True, out=io.StringIO())
    cells = list(csv.DictReader(io.StringIO((sweep / "report" / "table.csv").read_text())))
    for cell, record in zip(cells, read_results(sweep), strict=True):
        assert cell["trial"] == record["trial"]
        assert float(cell["perplexity"]) == record["perplexity"]
        assert float(cell["sparsity"]) == record["sparsity"]
        assert float(cell["cache_bytes"]) == record["cache_bytes"]


def test_training_curves_that_are_gone_leave_no_stale_plot(sweep, undrawn):
    report(sweep, json_lines=True, out=io.StringIO())
    for path in sweep.glob("*/metrics.jsonl"):
        path.unlink()
    report(sweep, json_lines=True, out=io.StringIO())
    assert not (sweep / "report" / "training.png").exists()


def test_a_resumed_run_counts_each_step_once_and_a_torn_line_not_at_all(sweep):
    with (sweep / "l8" / "metrics.jsonl").open("a") as lines:
        lines.write('{"kind": "train", "step": 2, "loss": 7.0}\n{"kind": "train", "st')
    assert [(row["step"], row["loss"]) for row in read_training(sweep)["l8"]] == [(1, 2.99), (2, 7.0), (3, 2.97)]


@pytest.mark.parametrize("value", [None, "absent", float("nan"), "text", 0])
def test_no_field_of_a_result_is_needed_for_a_report(tmp_path, value):
    full = whole("l8")
    partial = {key: full[key] if key in ("trial", "model", "policy") else value for key in full}
    partial = {key: kept for key, kept in partial.items() if kept != "absent"}
    folder = write_sweep(tmp_path / "demo", [partial, whole("d", policy="dense", target=None)])
    out = io.StringIO()
    report(folder, json_lines=False, out=out)
    assert "learned" in out.getvalue()


def test_a_broken_result_counts_as_missing_and_is_named(sweep, caplog):
    (sweep / "l9" / "result.json").write_text('{"trial": "l9", "perpl')
    assert "l9" in missing(sweep)
    assert "l9/result.json cannot be read" in caplog.text


@pytest.mark.parametrize("json_lines", [True, False])
def test_a_sweep_without_a_finished_trial_is_one_line_that_says_what_to_do(tmp_path, json_lines):
    folder = write_sweep(
        tmp_path / "demo", [], [{"trial": "a", "cause": "killed\nhard", "log": "a.txt", "step": 3}], ["b"]
    )
    out = io.StringIO()
    with pytest.raises(
        UserError, match=r"no finished trial, 1 failed, 1 not run yet .*killed hard.*run the sweep"
    ) as caught:
        report(folder, json_lines=json_lines, out=out)
    assert "\n" not in str(caught.value)
    assert out.getvalue() == ""
    assert not (folder / "report").exists()


@pytest.mark.parametrize("plan", [None, "{", "[]", '{"trials": 3}', '{"trials": [{"trial": 3}]}'])
def test_a_folder_that_is_not_a_sweep_is_refused(tmp_path, plan):
    if plan is not None:
        (tmp_path / "plan.json").write_text(plan)
    with pytest.raises(UserError, match=r"plan\.json"):
        report(tmp_path, json_lines=False)
    with pytest.raises(UserError, match="there is no sweep at"):
        report(tmp_path / "elsewhere", json_lines=False)
