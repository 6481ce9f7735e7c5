"""How many requests fit a pool of memory, and how fast are they served? Dense and pruned, from equal pools."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from torch import Tensor

from ctxprune.calls import Mode
from ctxprune.generation.batching import Batcher
from ctxprune.generation.sampling import Sampling
from ctxprune.retrofitting import mode
from pipelines.config import GenerationConfig
from pipelines.generation_benchmark.calibration import calibrate
from pipelines.generation_benchmark.method import now
from pipelines.generation_benchmark.peers import DENSE, percent
from pipelines.generation_benchmark.subject import PAGE, RANDOM, Subject


def served(subject: Subject, settings: GenerationConfig, context: int, repeats: int = 1) -> Iterator[dict[str, object]]:
    """One record per method, dense first; each repeat serves all requests with every method in turn."""
    prompts = subject.prompts(settings.pool_requests, context)
    # The likeliest tokens of a random model are soon a loop, whose keys are all alike and outlive what its gates were
    # calibrated on; what it samples is like its prompts.
    temperature = 1.0 if subject.gates == RANDOM else 0.0
    methods: dict[str, tuple[object, Mode, float | None]] = {}
    for drop, model in subject.pruned.items():
        methods.setdefault(DENSE, (model, "dense", None))
        if drop is not None:
            calibrate(model, prompts, drop)
        methods["ctxprune pruned" if drop is None else f"ctxprune pruned {percent(drop)}"] = (model, "hard", drop)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, (model, decides, _) in methods.items():
            found[name].append(_one(model, decides, prompts, settings, temperature))
    rates = {name: [one["tokens_per_second"] for one in runs] for name, runs in found.items()}
    for name, (_, decides, drop) in methods.items():
        record = {"method": name, "pruned": decides == "hard", "dropped": drop, "repeats": repeats, **found[name][-1]}
        record |= {
            "new_tokens": settings.new_tokens,
            "temperature": temperature,
            "seconds": statistics.median(one["seconds"] for one in found[name]),
        }
        record |= {"tokens_per_second": statistics.median(rates[name])}
        record |= {"tokens_per_second_spread": [min(rates[name]), max(rates[name])]}
        if decides == "hard":
            ratios = [mine / dense for mine, dense in zip(rates[name], rates[DENSE], strict=True)]
            record |= {"most_running_over_dense": record["most_running"] / found[DENSE][-1]["most_running"]}
            record |= {"tokens_per_second_over_dense": statistics.median(ratios)}
            record |= {"tokens_per_second_over_dense_spread": [min(ratios), max(ratios)]}
        yield record


def _one(model, decides: Mode, prompts: Tensor, settings: GenerationConfig, temperature: float) -> dict[str, float]:
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
        requests = [
            batcher.submit(prompt, max_new_tokens=settings.new_tokens, sampling=Sampling(temperature, seed=seed))
            for seed, prompt in enumerate(prompts)
        ]
        batcher.run()
        seconds = now(prompts.device) - start
    written = sum(len(one.tokens) for one in requests)
    fed = prompts.shape[1] + settings.new_tokens - 1  # the last token is written and not read
    alive = statistics.mean(one.live_tokens for one in requests) / fed
    return {
        "requests": len(requests),
        "most_running": batcher.most_running,
        "pauses": sum(one.pauses for one in requests),
        "live_share_at_end": alive,
        "peak_cache_bytes": batcher.peak_cache_bytes,
        "seconds": seconds,
        "tokens_per_second": written / seconds,
    }
