"""How fast does a whole model write when it may forget? Parity first; then our engine pruned and dense, transformers
and kvpress, on the same weights, in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch

from pipelines import output
from pipelines.config import Config, GenerationConfig
from pipelines.generation_benchmark import clock, lines, memory, parity, pool, ratios
from pipelines.generation_benchmark.calibration import calibrate
from pipelines.generation_benchmark.method import Method, Peer
from pipelines.generation_benchmark.peers import peers
from pipelines.generation_benchmark.subject import Subject, opened
from pipelines.machine import machine, versions
from pipelines.progress import Bars


def main(config: Config, overrides: list[str]) -> int:
    """Emit one record per method, context and batch, then those over all of them; 1 where our own results are wrong
    (nothing is timed then)."""
    settings, format = _tidy(config.generation), config.format
    config.generation = settings
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = opened(config, overrides, device)
    right = parity.checked(subject)
    base = _base(subject, settings, device)
    output.emit(right | {"machine": base["machine"], "versions": base["versions"]}, format, lines.parity(right))
    if not right["passed"]:
        return 1
    if format == "text":
        output.emit({}, format, lines.head(subject.gates, base["model"]))
    todo = list(product(settings.contexts, settings.batches))
    pools = settings.contexts if settings.pool_gb > 0 else []
    every: list[dict] = []
    with Bars() as bars, bars.task("generation (cases)", len(todo) + len(pools)) as advance:
        for done, (context, batch) in enumerate(todo):
            records = ratios.compared(list(measured(subject, settings, context, batch, config.benchmark.repeats)))
            for record in records:
                output.emit(base | {"table": "methods"} | record, format, lines.line(record))
            if format == "text":
                output.emit({}, format, lines.comparison(records))
            every += records
            advance(done + 1)
        for done, context in enumerate(pools):
            for found in pool.served(subject, settings, context, config.benchmark.repeats):
                record = {"context": context, "pool_gb": settings.pool_gb, **found}
                output.emit(base | {"table": "pool"} | record, format, lines.pool(record))
            advance(len(todo) + done + 1)
    for record in ratios.best(every):
        output.emit(base | {"table": "best batch"} | record, format, lines.best(record))
    for record in ratios.break_even(every):
        output.emit(base | {"table": "break even"} | record, format, lines.break_even(record))
    return 0


def measured(
    subject: Subject, settings: GenerationConfig, context: int, batch: int, repeats: int
) -> Iterator[dict[str, object]]:
    """One record per peer of one case: times, bytes, and the share of keys that live."""
    prompts = subject.prompts(batch, context)
    for drop, model in subject.pruned.items():
        if drop is not None:
            calibrate(model, prompts, drop)
    everybody = peers(subject, settings)
    absent = {peer.name: peer.absent for peer in everybody if peer.absent is not None}
    absent |= clock.warmed([peer for peer in everybody if peer.name not in absent], prompts)
    methods = {peer.name: peer.make(prompts) for peer in everybody if peer.name not in absent}
    read = clock.read_in_turn(methods, repeats)
    after_prompt = {name: method.live_share() for name, method in methods.items()}
    steps = clock.steps_in_turn(methods, settings.new_tokens)
    weighed = {name: _weighed(method) for name, method in methods.items()}
    methods.clear()  # caches are large; what follows starts processes of its own
    for peer in everybody:
        record = {
            "context": context, "batch": batch, "method": peer.name, "engine": peer.engine, "pruned": peer.pruned,
            "dropped": peer.dropped, **peer.facts,
        }  # fmt: skip
        name = peer.name
        if name in absent:
            yield record | {"absent": absent[name]}
            continue
        record |= clock.told(batch, read[name], steps[name]) | weighed[name]
        record |= {"live_share": after_prompt[name], "weight_bytes": peer.weight_bytes}
        record["step_bytes"] = peer.weight_bytes + record["cache_live_bytes"]
        if settings.memory:
            record |= _peak(peer, subject, settings, prompts)
        yield record


def _weighed(method: Method) -> dict[str, object]:
    live, allocated = method.cache_bytes()
    return {
        "cache_live_bytes": live,
        "cache_allocated_bytes": allocated,
        "live_share_at_end": method.live_share(),
    }


def _peak(peer: Peer, subject: Subject, settings: GenerationConfig, prompts: torch.Tensor) -> dict[str, object]:
    try:
        return {"peak_bytes": memory.peak_memory(peer, subject, settings, prompts)}
    except Exception as error:  # other people's code fails in a way of its own; ours must not fail unheard
        if peer.engine == "ctxprune":
            raise
        return {"no_peak": output.said(error)}


def _tidy(settings: GenerationConfig) -> GenerationConfig:
    """Every context, batch and drop once, rising."""
    once = {name: sorted(set(getattr(settings, name))) for name in ("contexts", "batches", "drops")}
    return dataclasses.replace(settings, **once)


def _base(subject: Subject, settings: GenerationConfig, device: torch.device) -> dict:
    """What every record says."""
    config, twin = subject.twin.config, subject.twin
    asked = dataclasses.asdict(settings)
    if settings.checkpoint is not None:
        asked["checkpoint"] = Path(settings.checkpoint).name  # whose, not where it lay
    model = {
        "family": config.model_type,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "vocab": config.vocab_size,
        "parameters": sum(parameter.numel() for parameter in twin.parameters()),
        "dtype": str(twin.dtype).removeprefix("torch."),
    }
    measured_on = {"device": device.type, "threads": torch.get_num_threads()}
    measured_on |= {"machine": machine(), "versions": versions()}
    return {"kind": "generation", "gates": subject.gates, "model": model, "settings": asked, **measured_on}
