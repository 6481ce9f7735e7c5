"""How many requests fit a pool of memory, and how fast are they served? Dense and pruned, from equal pools."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ctxprune.batching import Batcher
from ctxprune.calls import Mode
from ctxprune.retrofitting import mode
from pipelines.config import GenerationConfig
from pipelines.generation_benchmark.calibration import calibrate
from pipelines.generation_benchmark.method import now
from pipelines.generation_benchmark.peers import DENSE, percent
from pipelines.generation_benchmark.subject import PAGE, Subject

RATIOS = ("most_running", "tokens_per_second")
"""What is compared with dense."""


def served(subject: Subject, settings: GenerationConfig, context: int) -> Iterator[dict[str, object]]:
    """One record per method, dense first."""
    prompts = subject.prompts(settings.pool_requests, context)
    dense = _one(next(iter(subject.pruned.values())), "dense", prompts, settings)
    yield {"method": DENSE, "pruned": False, "dropped": None, **dense}
    for drop, model in subject.pruned.items():
        if drop is not None:
            calibrate(model, prompts, drop)
        name = "ctxprune pruned" if drop is None else f"ctxprune pruned {percent(drop)}"
        found = _one(model, "hard", prompts, settings)
        over = {f"{key}_over_dense": found[key] / dense[key] for key in RATIOS}
        yield {"method": name, "pruned": True, "dropped": drop, **found, **over}


def _one(model, decides: Mode, prompts: Tensor, settings: GenerationConfig) -> dict[str, float]:
    """All requests at once into the queue; seconds until the last has ended, prompts included."""
    with mode(model, decides):
        batcher = Batcher(
            model,
            max_batch=len(prompts),
            max_cache_bytes=int(1e9 * settings.pool_gb),
            prefill_chunk=settings.prefill_chunk,
            page=PAGE,
        )
        start = now(prompts.device)
        requests = [batcher.submit(prompt, max_new_tokens=settings.new_tokens) for prompt in prompts]
        batcher.run()
        seconds = now(prompts.device) - start
    written = sum(len(one.tokens) for one in requests)
    return {
        "requests": len(requests),
        "most_running": batcher.most_running,
        "pauses": sum(one.pauses for one in requests),
        "peak_cache_bytes": batcher.peak_cache_bytes,
        "seconds": seconds,
        "tokens_per_second": written / seconds,
    }
