"""How is generation timed? Methods in turn, a few steps each, so that a slow minute of the machine hits all."""

from __future__ import annotations

import time

import torch

from ctxprune.generation.captured import STEADY
from pipelines import output
from pipelines.generation_benchmark.method import Method, Peer
from pipelines.kernel_benchmark.clock import summary

WARM_UP = STEADY + 2
"""Steps after the prompt that are not timed: the first plans slots, or allocates, and then one is captured on a GPU."""
GROUP = 8
"""Steps of one method before the next one's turn."""
READ_SECONDS = 10.0
"""Prompts are read again, up to benchmark.repeats times, until this is spent on them: cheap ones are the noisy ones."""
SHORT = 16
"""Tokens of the prompt on which every method runs once before anything counts."""


def warmed(peers: list[Peer], prompts: torch.Tensor) -> dict[str, str]:
    """Every peer run once on the beginning of the prompts; of somebody else's that fail here, what they said."""
    failed = {}
    for peer in peers:
        try:
            short = peer.make(prompts[:, :SHORT])
            short.read()
            short.steps(WARM_UP)
        except Exception as error:  # other people's code refuses a model in a way of its own
            if peer.engine == "ctxprune":
                raise
            failed[peer.name] = output.said(error)
    return failed


def read_in_turn(methods: dict[str, Method], repeats: int) -> dict[str, list[float]]:
    """Seconds to each method's first tokens; the last reading stays, to be written on."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    start = time.perf_counter()
    for _ in range(repeats):
        for name, method in methods.items():
            times[name].append(method.read())
        if time.perf_counter() - start > READ_SECONDS:
            break
    return times


def steps_in_turn(methods: dict[str, Method], count: int) -> dict[str, list[float]]:
    """Seconds of each method's next steps."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for method in methods.values():
        method.steps(WARM_UP)
    for group in torch.arange(count).tensor_split(-(-count // GROUP)):
        for name, method in methods.items():
            times[name] += method.steps(len(group))
    return times


def told(batch: int, read: list[float], steps: list[float]) -> dict[str, object]:
    """What a record says of a method's times. The rate is that of the median step; the mean, beside it, has the steps
    in it that plan or tidy up."""
    seconds = torch.tensor(read, dtype=torch.float64)
    step = summary("decode", steps)
    return {
        **step,
        "decode_mean_ms": 1e3 * sum(steps) / len(steps),
        "steps": len(steps),
        "tokens_per_second": 1e3 * batch / step["decode_ms"],
        "prefill_seconds": seconds.median().item(),
        "prefill_seconds_spread": [seconds.min().item(), seconds.max().item()],
        "prefills": len(read),
    }
