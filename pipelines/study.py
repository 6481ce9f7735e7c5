"""What has to be done for a trial, and what does each step depend on?

Data -> base model -> train -> evaluate -> benchmark.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctxprune import checkpoint
from ctxprune.errors import UserError
from pipelines import store
from pipelines.compose import config_hash
from pipelines.config import Config, to_record
from pipelines.grid import Trial
from pipelines.worker import METRICS, Job

FORMAT = 3
"""Raise when the meaning of a step's output changes: old outputs are then made anew."""
BASE_TRAIN = ("base_steps", "base_learning_rate", "batch", "context", "warmup", "decay", "weight_decay", "clip", "seed")
"""Settings of `train` that a base model depends on."""
TRIAL_TRAIN = (
    *("steps", "learning_rate", "gate_learning_rate", "batch", "context"),
    *("warmup", "decay", "weight_decay", "clip", "seed"),
)
"""Settings of `train` that a trial depends on beyond its base model."""


SHARED = ("model", "data", "train", "engine", "evaluate")
"""What a trial and its dense rival have in common, the seed left out."""


@dataclass
class Steps:
    """One trial and where the output of each of its steps lies."""

    trial: Trial
    base: Job | None
    """The job that makes its base model; None where a pretrained one is given."""
    job: Job
    benchmark: Path
    benchmark_inputs: dict

    def missing(self) -> list[str]:
        """Names of the steps that still have to run."""
        wanted = {
            "base": self.base.folder if self.base else None,
            "train": self.job.folder,
            "evaluate": self.job.evaluation,
            "benchmark": self.benchmark,
        }
        return [name for name, folder in wanted.items() if folder is not None and not store.finished(folder)]


def steps(trial: Trial, data: Path, machine: dict) -> Steps:
    """Where everything a trial needs lies, or will lie. data: the prepared corpus; machine: where benchmarks run."""
    config, root = trial.config, Path(trial.config.runs) / "store"
    engine = dataclasses.asdict(config.engine) | {"workers": config.cluster.workers}
    record = to_record(config)
    shared = {"format": FORMAT, "data": data.name, "engine": engine}
    base, start = None, {"pretrained": _fingerprint(config.model.path)}
    if config.model.path is None:
        shape = {k: v for k, v in record["model"].items() if k not in ("name", "path")}
        inputs = shared | {"model": shape, "train": {name: record["train"][name] for name in BASE_TRAIN}}
        base = Job("base", record, str(root), str(data), None, inputs)
        start = {"base": base.folder.name}
    pruning = record["pruning"] | {"policy_settings": record["policy"]}
    inputs = shared | start | {"pruning": pruning, "train": {name: record["train"][name] for name in TRIAL_TRAIN}}
    job = Job("train", record, str(root), str(data), str(base.folder / "model") if base else config.model.path, inputs)
    job.evaluate_inputs = {"format": FORMAT, "train": job.folder.name, "evaluate": record["evaluate"]}
    benchmark = {"format": FORMAT, "train": job.folder.name, "benchmark": record["benchmark"], "machine": machine}
    return Steps(trial, base, job, store.folder_of(root, "benchmark", benchmark), benchmark)


def collect(one: Steps, sweep: str, machine: dict, versions: dict) -> dict:
    """result.json of a finished trial, from the outputs of its steps."""
    config = one.trial.config
    training = _read(one.job.folder / "training.json")
    evaluation = _read(one.job.evaluation / "evaluation.json")
    speed = _read(one.benchmark / "speed.json")
    pruning = checkpoint.read_pruning(one.job.folder / "model")["pruning"]
    return {
        "trial": one.trial.name,
        "sweep": sweep,
        "model": config.model.name,
        "policy": config.pruning.policy,
        "sparsity_target": config.pruning.sparsity,
        "gamma": config.pruning.gamma,
        **{name: evaluation[name] for name in ("sparsity", "sparsity_per_layer", "sparsity_at")},
        **{name: evaluation[name] for name in ("perplexity", "perplexity_soft", "perplexity_at")},
        "evaluated_tokens": evaluation["tokens"],
        **{name: value for name, value in speed.items() if name != "seconds"},
        **{name: training[name] for name in ("parameters", "gate_parameters", "train_tokens")},
        "seed": config.train.seed,
        "setting": setting(config),
        "wall_seconds": round(training["seconds"] + evaluation["seconds"] + speed["seconds"], 3),
        "pruning": pruning,
        "benchmark": dataclasses.asdict(config.benchmark),
        "machine": machine,
        "versions": versions,
    }


def setting(config: Config) -> str:
    """16 hex digits of all that trials share which differ in pruning and seed alone: what may be held against which."""
    parts: dict[str, Any] = {name: dataclasses.asdict(getattr(config, name)) for name in SHARED}
    parts["train"].pop("seed")
    return config_hash(parts | {"workers": config.cluster.workers})


def publish(one: Steps, folder: Path, result: dict) -> None:
    """Fill a trial's folder: metrics.jsonl, train -> store, result.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "failure.json").unlink(missing_ok=True)
    (folder / METRICS).write_bytes((one.job.folder / METRICS).read_bytes())
    link = folder / "train"
    link.unlink(missing_ok=True)
    link.symlink_to(Path("..") / ".." / "store" / one.job.folder.name)
    store.write_json(folder / "result.json", result)


def _fingerprint(path: str | None) -> str | dict:
    """What a pretrained model is: the hashes of a local folder's files, or the hub id itself."""
    if path is None or not Path(path).is_dir():
        return path or ""
    wanted = sorted(p for p in Path(path).iterdir() if p.suffix in (".safetensors", ".json") and p.is_file())
    if not wanted:
        raise UserError(f"{path} has no config.json: give the folder of a transformers model")
    return {p.name: checkpoint.digest(p) for p in wanted}


def _read(path: Path) -> dict:
    return json.loads(path.read_text())
