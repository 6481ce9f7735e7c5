"""What does one Ray task of the study do? It trains a small model, or measures one method at one budget on it.

Both are plain functions of plain values whose output is kept under the hash of these: a second start finds it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import ctxprune
from ctxprune.checkpoint import digest
from ctxprune.policies import DenseConfig
from ctxprune.tasks.scoring import paired_bootstrap, pearson
from pipelines import store
from pipelines.policy_study import small_model, texts
from pipelines.policy_study.config import StudyConfig
from pipelines.policy_study.measure import Outcome, measure, predictions
from pipelines.policy_study.methods import named, retrofitted

FORMAT = 7
"""Raised when a step's output would differ for the same inputs; where only one method's would, its edition is."""
SETTLING = 2
"""Raised when the budgets of all that keep what a threshold keeps are set otherwise."""
SHAPE = small_model.Shape()
ROWS = 2048
"""Test rows per point, where the study does not say."""


def model_inputs(task: str, steps: int, seed: int, rows: str | None = None) -> dict:
    """What a small model depends on. rows: of a task of files, what texts.rows_of names."""
    values = {"task": task} if rows is None else {"task": task, "rows": rows}
    return {"format": FORMAT, "task": values, "shape": asdict(SHAPE), "steps": steps, "seed": seed}


def point_of(root: Path, study: StudyConfig, model: dict, method: str, share: float) -> dict:
    """The inputs of one point of this study. model: those of its small model."""
    rows, folder = study.rows, model["task"].get("rows")
    if rows is None:
        rows = ROWS if folder is None else min(ROWS, texts.Texts(str(root / folder)).rows("test"))
    return point_inputs(model, method, share, rows, study.seconds)


def point_inputs(model: dict, method: str, share: float, rows: int, seconds: float | None = None) -> dict:
    """What one point of the study depends on; on a limit in seconds only where the method has one."""
    inputs = {"format": FORMAT, "model": model, "method": method, "share": share, "rows": rows}
    (found,) = named([method])
    if found.edition > 1:
        inputs["edition"] = found.edition
    if found.adaptive:
        inputs["settling"] = SETTLING
    return inputs if seconds is None or not found.limited else inputs | {"seconds": seconds}


def make_model(root: str, inputs: dict) -> None:
    """Train the small model, unless that is done."""

    def make(staged: Path) -> None:
        task = texts.restored(Path(root), inputs["task"])
        model = small_model.train(task, SHAPE, inputs["steps"], inputs["seed"])
        model.save_pretrained(staged / "model")
        right = small_model.row_scores(model, task).mean().item()
        store.write_json(staged / "model.json", {"right": right})

    torch.set_num_threads(1)
    store.ensure(Path(root), "study-model", inputs, make)


def make_point(root: str, inputs: dict) -> None:
    """Measure one method at one budget, unless that is done."""
    torch.set_num_threads(1)
    store.ensure(Path(root), "study-point", inputs, lambda staged: _measured(Path(root), inputs, staged))


def small(root: Path, inputs: dict):
    """The trained small model, as transformers loads it."""
    folder = store.folder_of(root, "study-model", inputs) / "model"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _measured(root: Path, inputs: dict, staged: Path) -> None:
    task, (method,) = texts.restored(root, inputs["model"]["task"]), named([inputs["method"]])
    rows, (dense, said) = inputs["rows"], _dense(root, json.dumps(inputs["model"]), inputs["rows"])
    seed, seconds, notes = inputs["model"]["seed"], inputs.get("seconds"), {}
    torch.manual_seed(seed)  # gates and networks begin alike, whatever this process has measured before
    model, told = small(root, inputs["model"]), {"seconds": seconds, "notes": notes, "rows": rows}
    model = retrofitted(method, model, task, inputs["share"], seed, **told)
    shown = partial(method.shown, share=inputs["share"]) if method.shown else None
    found = measure(model, task, rows, prepared=method.around, dense=said, shown=shown)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, staged / "weights.safetensors"
    )
    weights = store.folder_of(root, "study-model", inputs["model"]) / "model" / "model.safetensors"
    point = summary(found, dense) | notes | {"model": digest(weights)[:16]}
    store.write_json(staged / "point.json", point | {"cache": point["kept"] * notes["key_bytes"]})


@lru_cache(maxsize=1)
def _dense(root: Path, model: str, rows: int) -> tuple[Outcome, list[Tensor]]:
    """What every point of a small model (its inputs, as JSON) is held against: what it answers, keeping everything."""
    inputs = json.loads(model)
    whole, task = ctxprune.retrofit(small(root, inputs), DenseConfig()), texts.restored(root, inputs["task"])
    return measure(whole, task, rows), predictions(whole, task, rows)


def summary(found: Outcome, dense: Outcome) -> dict[str, float | None]:
    """The numbers of a point; null where the task does not know."""
    difference, low, high = paired_bootstrap(found.right, dense.right)
    # Rows that keep nothing have no precision: not a number there.
    record = {
        "right": found.right.mean().item(),
        "against_dense": difference,
        "against_dense_low": low,
        "against_dense_high": high,
        "worst_row": found.right.min().item(),
        "agreement": found.agreement.mean().item(),
        "kept": found.kept.mean().item(),
        "precision": found.precision.nanmean().item(),
        "recall": found.recall.nanmean().item(),
        "kept_and_difficulty": pearson(found.kept, found.difficulty) if len(found.difficulty) else None,
    }
    return {name: None if value is None or value != value else value for name, value in record.items()}


def read_point(root: Path, inputs: dict) -> dict:
    """What make_point found."""
    return json.loads((store.folder_of(root, "study-point", inputs) / "point.json").read_text())
