"""Is it worth it that tokens leave the residual stream? Accuracy on a person's long texts and time of whole passes,
beside dense, shorter texts of equal FLOPs, other scores, and the same schedule without training under it. On a CPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ctxprune.tasks.scoring import paired_bootstrap
from ctxprune.text.batches import IGNORED
from pipelines import output
from pipelines.config import Config, HiddenConfig
from pipelines.hidden_benchmark import clock, entities, lines, training
from pipelines.hidden_benchmark.method import Method, methods
from pipelines.hidden_benchmark.rows import Rows, rows_of
from pipelines.machine import machine, versions
from pipelines.progress import Bars


def main(config: Config) -> int:
    """Emit a record of the data, one per method on its accuracy, and one per batch and method on its time."""
    settings, format, root = config.hidden, config.format, Path(config.runs) / "store"
    base = {"kind": "hidden", "settings": _asked(settings), "device": "cpu", "threads": torch.get_num_threads()}
    base |= {"machine": machine(), "versions": versions()}
    rows, every = rows_of(root, settings), methods(settings)
    with Bars() as bars:
        folders, scores = _learned(root, settings, rows, every, bars)
        models = [(method, training.loaded(folders[method.name], method)) for method in every]
        parameters = sum(parameter.numel() for parameter in models[0][1].parameters())
        about = described(settings, rows) | {"parameters": parameters}
        output.emit(base | {"table": "data"} | about, format, lines.data(about))
        for method in every:
            record = judgement(method, every[0], scores, folders[method.name])
            output.emit(base | {"table": "accuracy"} | record, format, lines.accuracy(record))
            if method is every[0] and (nothing := lines.unlearned(record, about)):
                bars.say(nothing)
        for record in _timed(settings, rows, models, config.benchmark.repeats, bars):
            output.emit(base | {"table": "prefill"} | record, format, lines.prefill(record))
    return 0


def described(settings: HiddenConfig, rows: Rows) -> dict[str, object]:
    """What is classified, and what saying the most frequent class always would get right."""
    judged = rows.classes[settings.judged_on]
    judged = judged[judged != IGNORED]
    return {
        "labels": rows.labels,
        "rows": {split: len(ids) for split, ids in rows.ids.items()},
        "left_out": rows.left_out,
        "most_frequent": judged.bincount().max().item() / len(judged),
        "vocab_size": rows.vocab_size,
        **{name: getattr(settings, name) for name in ("task", "judged_on", "tokens", "base_steps", "steps", "batch")},
    }


def judgement(method: Method, dense: Method, scores: dict[str, Tensor], folder: Path) -> dict[str, object]:
    """Accuracy, and how much above (or below) dense on the same rows, with its 95 % interval: of F1 where names are
    found; accuracy is then that of words' tags.

    It is that of drawing other rows, not of training again, for which there is hidden.seed.
    """
    mine, theirs = scores[method.name], scores[dense.name]
    if mine.ndim > 1:
        accuracy, more = (mine[:, 3].sum() / mine[:, 4].sum()).item(), {"f1": entities.f1(mine).item()}
        difference, low, high = entities.bootstrap(mine, theirs)
    else:
        accuracy, more = mine.mean().item(), {}
        difference, low, high = paired_bootstrap(mine, theirs)
    return {
        "method": method.name,
        "tokens": method.tokens,
        "kept": list(method.kept),
        "flops": method.flops,
        "flops_of_dense": method.flops / dense.flops,
        "accuracy": accuracy,
        **more,
        "against_dense": difference,
        "against_dense_low": low,
        "against_dense_high": high,
        "judged_rows": len(scores[method.name]),
        "training_loss": json.loads((folder / "training.json").read_text())["loss"],
    }


def _learned(
    root: Path, settings: HiddenConfig, rows: Rows, every: list[Method], bars: Bars
) -> tuple[dict[str, Path], dict[str, Tensor]]:
    """By method, the folder of its model and which rows it got right."""
    folders, scores = {}, {}
    with bars.task("from scratch (steps)", settings.base_steps) as advance:
        start = training.base(root, settings, rows, advance)
    for method in every:
        with bars.task(f"{method.name} (steps)", settings.steps) as advance:
            folders[method.name] = training.fine_tuned(root, settings, rows, method, start, advance)
        with bars.task(f"{method.name} (rows)", len(rows.ids[settings.judged_on])) as advance:
            scores[method.name] = training.right(root, settings, rows, method, folders[method.name], advance)
    return folders, scores


def _timed(
    settings: HiddenConfig, rows: Rows, models: list[tuple[Method, torch.nn.Module]], rounds: int, bars: Bars
) -> Iterator[dict[str, object]]:
    batches = sorted(set(settings.batches))
    with bars.task("prefill (batches)", len(batches)) as advance:
        for done, batch in enumerate(batches):
            passes = clock.timed(models, rows.ids[settings.judged_on], batch, rounds)
            for method, _ in models:
                yield {"method": method.name, "batch": batch, **clock.told(passes, method.name)}
            advance(done + 1)


def _asked(settings: HiddenConfig) -> dict[str, object]:
    """The settings, files by their names: whose, not where they lay."""
    asked = dataclasses.asdict(settings)
    for name in ("train_file", "test_file", "tokenizer"):
        if asked[name] and Path(asked[name]).exists():  # else a hub id
            asked[name] = Path(asked[name]).name
    return asked
