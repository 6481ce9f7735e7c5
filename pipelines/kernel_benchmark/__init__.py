"""How fast is pruned attention beside every peer that runs here? Parity first, then times in turn, then peak memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from pipelines import output
from pipelines.config import Config, KernelsConfig
from pipelines.kernel_benchmark import clock, decoding, lines, memory, parity, prefill, problem, training
from pipelines.kernel_benchmark.peer import Peer
from pipelines.kernel_benchmark.problem import Case, Problem
from pipelines.machine import machine, versions
from pipelines.progress import Bars

OPERATIONS = {"training": training, "prefill": prefill, "decoding": decoding}
"""Each module says who takes part (peers), which pass counts (MAIN) and what our time is divided by (OVER)."""


def main(config: Config) -> int:
    """Emit one record per peer, problem and operation; 1 where our own results are wrong (nothing is timed then)."""
    settings = config.kernels
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases, lengths = source(settings, device)
    right = [_parity(name, settings, cases, device, config.format) for name in settings.operations]
    if not all(right):
        return 1
    if config.format == "text":
        output.emit({}, config.format, lines.head())
    todo = [(case, name) for case in cases(settings, lengths=lengths) for name in settings.operations]
    with Bars() as bars, bars.task("kernels (problems)", len(todo)) as advance:
        for done, (case, name) in enumerate(todo):
            records = []
            for record in measured(name, case, settings, config.benchmark.repeats, device):
                records.append(record)
                output.emit(record, config.format, lines.line(record))
            if config.format == "text":
                output.emit({}, config.format, lines.comparison(records))
            advance(done + 1)
    return 0


def source(settings: KernelsConfig, device: torch.device) -> tuple[Callable[..., list[Case]], list[int]]:
    """Where problems come from, called with settings and lengths=[...], and the lengths to measure."""
    if settings.checkpoint is None:
        return partial(problem.cases, device=device), settings.lengths
    # transformers is needed for a trained model alone.
    from pipelines.kernel_benchmark import recorded

    model, tokens = recorded.opened(settings, device)
    return partial(recorded.cases, model=model, tokens=tokens), [tokens.shape[1]]


def _parity(
    name: str, settings: KernelsConfig, cases: Callable[..., list[Case]], device: torch.device, format: str
) -> bool:
    few = dataclasses.replace(settings, batch=parity.ROWS, decode_batch=parity.ROWS)
    small = cases(few, lengths=[parity.TOKENS])
    wrong, allowed = parity.disagreement(name, OPERATIONS[name], settings, small, device)
    record = {"kind": "parity", "operation": name, "passed": wrong <= allowed, "error": wrong, "allowed": allowed}
    output.emit(record, format, lines.parity(record))
    return wrong <= allowed


def measured(
    name: str, case: Case, settings: KernelsConfig, repeats: int, device: torch.device
) -> Iterator[dict[str, object]]:
    """One record per peer: median, quantiles and extremes of each pass, peers in turn; ours with its ratios."""
    operation, given = OPERATIONS[name], case.problem(name)
    peers: list[Peer] = operation.peers(settings, device, given.query.shape[1])
    absent = {peer.name: reason for peer in peers if (reason := peer.absent or _too_large(peer, settings, given))}
    ready, failed = clock.warmed([peer for peer in peers if peer.name not in absent], given, device)
    absent |= failed
    times = clock.in_turn(ready, repeats, device)
    base = {"kind": "kernels", "operation": name, **dataclasses.asdict(settings), **given.facts(), **case.label}
    if settings.checkpoint is not None:
        base["checkpoint"] = Path(settings.checkpoint).name  # whose, not where it lay
    if name == "decoding":
        base["n"] -= 1  # the last token steps over the others
    base |= {"main": operation.MAIN, "machine": machine(), "versions": versions()}
    facts = {peer: one.facts for peer, one in ready.items()}
    ready.clear()  # caches in many copies; what follows starts processes of its own
    found = {peer: _times(times[peer], facts[peer], operation.MAIN) for peer in times}
    for peer in peers:
        record = base | {"peer": peer.name, "gated": peer.gated}
        if peer.name in absent:
            yield record | {"absent": absent[peer.name]}
            continue
        record |= found[peer.name]
        if peer.exact is not None:
            record |= _ratios(found, peer.name, operation)
        if settings.memory and name != "decoding":
            record["peak_bytes"] = memory.peak_memory(name, peer.name, settings, given, device)
        yield record


def _times(own: dict[str, list[float]], facts: dict[str, object], main: str) -> dict[str, object]:
    """What a record says of its peer's passes."""
    if "both" in own:
        pairs = zip(own["both"], own["forward"], strict=True)
        own = {"forward": own["forward"], "backward": [both - forward for both, forward in pairs], "both": own["both"]}
    record = dict(facts)
    for key, times in own.items():
        record |= clock.summary(key, times)
    if "bytes_read" in facts:
        record["gb_per_second"] = facts["bytes_read"] / record[f"{main}_ms"] / 1e6
    return record


def _ratios(found: dict[str, dict], name: str, operation: ModuleType) -> dict[str, float | None]:
    """Our median over that of the others, each named by how its name ends, the same implementation first; None where
    one was not measured."""
    key, ratios = f"{operation.MAIN}_ms", {"over_sdpa": None, "over_reference": None}
    for short, ending in operation.OVER.items():
        own = name.removesuffix(ending) + ending
        other = own if own in found else next((other for other in found if other.endswith(ending)), None)
        ratios[f"over_{short}"] = found[name][key] / found[other][key] if other not in (None, name) else None
    return ratios


def _too_large(peer: Peer, settings: KernelsConfig, given: Problem) -> str | None:
    """Why a peer's n x n tensors leave it out."""
    batch, _, n, _ = given.query.shape
    if peer.pair_bytes * batch * n * n <= 1e9 * settings.largest_gb:
        return None
    return "its n x n tensors are more than kernels.largest_gb allows"
