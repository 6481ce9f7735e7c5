"""Who measures the trials' speed? One process after all training, alone on the machine, trial by trial."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from ctxprune import checkpoint
from ctxprune.errors import UserError
from ctxprune.text.batches import held_out_batches
from ctxprune.text.token_store import read_tokens
from pipelines import store
from pipelines.config import BenchmarkConfig
from pipelines.decoding_speed import compare
from pipelines.machine import device
from pipelines.models import refuse_long
from pipelines.progress import Bars
from pipelines.study import Steps

TEXT = "benchmark.prompt + benchmark.new_tokens"
"""What a benchmark decodes, in settings."""


def run_benchmarks(ready: list[Steps], bars: Bars, failed: Callable[[Steps, Exception], None]) -> None:
    """Benchmark every trained trial that has none yet, one at a time; one failure stops no other."""
    todo = [one for one in ready if not store.finished(one.benchmark)]
    if not todo:
        return
    with bars.task("benchmarks", len(todo)) as advance:
        for done, one in enumerate(todo):
            config = one.trial.config
            root = Path(config.runs) / "store"
            try:
                store.ensure(root, "benchmark", one.benchmark_inputs, lambda staged, one=one: _one(one, staged))
            except Exception as error:  # out of memory, or anything else: the others' results are still to come
                failed(one, error)
            advance(done + 1)


def _one(one: Steps, staged: Path) -> None:
    start, config = time.monotonic(), one.trial.config
    speed = measure(one.job.folder / "model", Path(one.job.data), config.benchmark)
    store.write_json(staged / "speed.json", speed | {"seconds": time.monotonic() - start})


def measure(model_folder: Path, data: Path, settings: BenchmarkConfig, advance=lambda done: None) -> dict:
    """Decoding speed and cache size of a saved model on held-out text; see ctxprune.decoding and
    decoding_speed.compare."""
    model = checkpoint.load(model_folder, device=device())
    refuse_long(model, settings.prompt + settings.new_tokens, TEXT)
    ids = text_of(data, settings)
    return compare(model, ids, settings.prompt, settings.repeats, advance)


def text_of(data: Path, settings: BenchmarkConfig) -> torch.Tensor:
    """Rows of held-out text; each is taken as one document."""
    length = settings.prompt + settings.new_tokens
    tokens = read_tokens(data).held_out
    if len(tokens.tokens) < length:
        raise UserError(f"held-out text has {len(tokens.tokens)} tokens, fewer than {TEXT} = {length}: lower one")
    rows = torch.cat([batch.input_ids for batch in held_out_batches(tokens, settings.batch, length, 10**9)])
    # Few held-out rows are repeated: speed does not mind.
    return rows[torch.arange(settings.batch) % len(rows)]
