"""The whole command, as a person runs it: plan, training, report; then every other verb on the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WANTED = {
    *("trial", "model", "policy", "sparsity_target", "sparsity", "perplexity", "perplexity_soft"),
    *("tokens_per_second", "ms_per_token", "tokens_per_second_dense", "cache_bytes", "cache_bytes_dense"),
    *("train_tokens", "seed", "setting", "wall_seconds", "machine", "versions"),
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def ctxprune(*words: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A study of seconds with one trial that cannot succeed: what it protects exceeds its budget."""
    folder = tmp_path_factory.mktemp("study")
    trials = [
        "pruning=dense",
        "pruning=learned pruning.sparsity=0.5",
        "pruning=window pruning.sparsity=0.95 policy.recent=40",
    ]
    lines = f"sweep.trials={trials}"
    return folder, ctxprune("sweep", "experiment=smoke", lines, "train.base_steps=12", folder=folder)


def results(folder: Path) -> dict[str, dict]:
    found = {}
    for path in (folder / "runs" / "smoke").glob("*/result.json"):
        record = json.loads(path.read_text())
        found[record["policy"]] = record
    return found


def test_a_failed_trial_is_reported_with_its_cause_while_the_others_finish(study):
    folder, done = study
    assert done.returncode == 1, done.stderr
    assert set(results(folder)) == {"dense", "learned"}
    (failure,) = (folder / "runs" / "smoke").glob("*/failure.json")
    record = json.loads(failure.read_text())
    assert "no window drops 95%" in record["cause"] and "Traceback" in Path(record["log"]).read_text()
    assert "no window drops 95%" in done.stderr


def test_the_plan_is_printed_before_anything_runs(study):
    folder, done = study
    lines = done.stderr.splitlines()
    plan = next(i for i, line in enumerate(lines) if "plan: 3 trials" in line)
    assert plan < next(i for i, line in enumerate(lines) if "done" in line and "base" in line)
    assert len(json.loads((folder / "runs" / "smoke" / "plan.json").read_text())["trials"]) == 3


def test_every_result_holds_the_fields_that_are_promised(study):
    folder, _ = study
    for record in results(folder).values():
        assert set(record) >= WANTED
        assert record["train_tokens"] == 4 * 2 * 64 and record["machine"]["cores"] >= 1 and record["versions"]["torch"]


def test_report_prints_one_json_object_per_trial_and_nothing_else(study):
    folder, _ = study
    done = ctxprune("report", "sweep=smoke", "format=json", folder=folder)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["policy"] for line in lines} == {"dense", "learned"}
    assert all(set(line) >= WANTED for line in lines)


def test_the_report_is_one_self_contained_page_with_table_and_plots(study):
    folder, _ = study
    report = folder / "runs" / "smoke" / "report"
    names = {path.name for path in report.iterdir()}
    assert names >= {"index.html", "table.md", "table.csv", "perplexity_vs_sparsity.png", "accuracy_vs_throughput.png"}


def test_a_second_start_does_only_what_is_missing(study):
    folder, _ = study
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs" / "store").glob("*/manifest.json")}
    done = ctxprune("train", "experiment=smoke", "pruning=dense", "train.base_steps=12", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "0 with work left" in done.stderr
    after = {p: p.stat().st_mtime_ns for p in (folder / "runs" / "store").glob("*/manifest.json")}
    assert after == before


def test_wandb_holds_an_offline_run_per_finished_trial(study):
    folder, done = study
    assert len(list((folder / "runs" / "smoke" / "wandb").glob("offline-run-*"))) == 2
    assert "was not mirrored" not in done.stderr


def learned(folder: Path) -> str:
    (trial,) = (folder / "runs" / "smoke").glob("smoke-learned-*")
    return f"checkpoint={trial}"


def test_evaluate_agrees_with_the_study(study):
    folder, _ = study
    words = ["evaluate.tokens=2048", "evaluate.batch=4", "evaluate.contexts=[32,64]"]
    done = ctxprune("evaluate", learned(folder), *words, "format=json", folder=folder)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    (saved,) = (folder / learned(folder).removeprefix("checkpoint=")).glob("train/model/pruning.json")
    assert json.loads(saved.read_text())["text_fingerprint"]  # or no text could be found to have changed
    assert record["perplexity"] == pytest.approx(results(folder)["learned"]["perplexity"], rel=1e-6)
    assert record["sparsity"] == pytest.approx(results(folder)["learned"]["sparsity"], abs=1e-9)


def test_benchmark_measures_a_saved_model(study):
    folder, _ = study
    words = ["benchmark.batch=2", "benchmark.prompt=16", "benchmark.new_tokens=8", "benchmark.repeats=1"]
    done = ctxprune("benchmark", learned(folder), *words, "format=json", folder=folder)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["tokens_per_second"] > 0 and record["cache_bytes"] > 0


def test_generate_continues_a_prompt(study):
    folder, _ = study
    done = ctxprune("generate", learned(folder), "generate.prompt=def f(", "generate.max_new_tokens=5", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def f(") and "context tokens still alive" in done.stdout


def test_generate_under_a_cap_an_alarm_and_without_loss(study):
    """What it says is what it was asked for; two at once are refused in a line."""
    folder, _ = study
    words = ["generate.prompt=def f(", "generate.max_new_tokens=12", "format=json"]

    def written(*how: str) -> dict:
        done = ctxprune("generate", learned(folder), *words, *how, folder=folder)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    capped, alarmed = written("generate.max_live_tokens=2"), written("generate.alarm_share=0.001")
    assert capped["live_tokens"] <= 2 < written()["live_tokens"] <= alarmed["live_tokens"]
    exact = written("generate.lossless=true")
    assert exact["new_tokens"] == 12 and 0 <= exact["accepted"] <= exact["drafted"] and "live_tokens" not in exact
    done = ctxprune("generate", learned(folder), "generate.lossless=true", "generate.max_live_tokens=2", folder=folder)
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0
    assert "generate.max_live_tokens does not go with generate.lossless" in done.stderr
