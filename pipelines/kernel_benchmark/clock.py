"""How is time taken? Every peer in turn within a repeat, by the device's own clock, from the same state each time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from pipelines import output
from pipelines.kernel_benchmark.peer import Peer, Prepared
from pipelines.kernel_benchmark.problem import Problem

SHARES = (0.0, 0.2, 0.5, 0.8, 1.0)
"""Quantiles of a record: the extremes, the middle 60 %, the median."""


def warmed(peers: list[Peer], given: Problem, device: torch.device) -> tuple[dict[str, Prepared], dict[str, str]]:
    """Every peer prepared and run once; and of somebody else's that fail here, what they said."""
    ready, failed = {}, {}
    for peer in peers:
        try:
            one = peer.prepare(given)
            for run in one.passes.values():
                one.before()
                run()
            _wait(device)
            ready[peer.name] = one
        except Exception as error:  # other people's kernels refuse a dtype or a size each in a way of its own
            if peer.exact is not None:
                raise
            failed[peer.name] = output.said(error)
    return ready, failed


def in_turn(ready: dict[str, Prepared], repeats: int, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Seconds of each pass of each peer, peers in turn within a repeat: a slow minute of the machine hits all."""
    times: dict[str, dict[str, list[float]]] = {name: {key: [] for key in one.passes} for name, one in ready.items()}
    for _ in range(repeats):
        for name, one in ready.items():
            for key, run in one.passes.items():
                one.before()
                times[name][key].append(seconds(run, device))
    return times


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """One call, from an idle device to its last result; on a GPU between two events of its stream."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _wait(device)
    first.record()
    run()
    last.record()
    _wait(device)
    return first.elapsed_time(last) / 1e3


def summary(name: str, times: list[float]) -> dict[str, object]:
    """Median, 20 % and 80 % quantiles and extremes, in milliseconds."""
    lowest, low, median, high, highest = (
        torch.tensor(times, dtype=torch.float64).mul(1e3).quantile(torch.tensor(SHARES, dtype=torch.float64)).tolist()
    )
    return {f"{name}_ms": median, f"{name}_ms_quantiles": [low, high], f"{name}_ms_spread": [lowest, highest]}


def captured(run: Callable[[], list[Tensor]], before: Callable[[], None]) -> Callable[[], list[Tensor]]:
    """The same call as a CUDA graph, which the host starts with one launch; RuntimeError where it cannot be captured.

    before: brings back the state that a call starts from; it is not part of the graph.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what is compiled or allocated at first calls must not be captured
        for _ in range(3):
            before()
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> list[Tensor]:
        graph.replay()
        return result

    return replay


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
