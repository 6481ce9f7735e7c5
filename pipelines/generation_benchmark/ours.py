"""How does our engine write? As generation.batching does: a token per row and step, pages given back now and then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune.cache.pruned_cache import SHRINK_EVERY, PrunedCache
from ctxprune.calls import Mode
from ctxprune.generation.captured import StepRunner
from ctxprune.generation.prefill import prefill
from ctxprune.retrofitting import mode
from pipelines.generation_benchmark.method import now
from pipelines.generation_benchmark.subject import PAGE


class Ours:
    """A retrofitted model under its step function (hard), or with its gates bypassed (dense)."""

    def __init__(self, model, decides: Mode, prompts: Int[Tensor, "batch n"], chunk: int):
        """chunk: prompt tokens per pass, 0 for whole prompts."""
        self.model, self.decides, self.prompts, self.chunk = model, decides, prompts, chunk
        self.cache = PrunedCache(page=PAGE)
        self.runner = StepRunner(model, self.cache)
        self.logits: Tensor | None = None
        """(batch, vocab): what the last tokens were picked from."""
        self.written: list[Tensor] = []

    def read(self) -> float:
        """See Method."""
        device = self.prompts.device
        with self._deciding():
            start = now(device)
            self.cache = PrunedCache(page=PAGE)
            self.runner.follow(self.cache)
            self.logits = prefill(self.model, self.cache, list(self.prompts), self.chunk)
            self.cache.shrink(0.0)
            self.written = [self.logits.argmax(-1)]
            return now(device) - start

    def steps(self, count: int) -> list[float]:
        """See Method."""
        device, times = self.prompts.device, []
        with self._deciding():
            for _ in range(count):
                start = now(device)
                self._step()
                times.append(now(device) - start)
        return times

    def _step(self) -> None:
        self.logits = self.runner(self.written[-1])
        if len(self.written) % SHRINK_EVERY == 0:
            self.cache.shrink()
        self.written.append(self.logits.argmax(-1))

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        with torch.inference_mode(), mode(self.model, self.decides):
            yield

    def text(self) -> Int[Tensor, "batch n"]:
        """See Method."""
        return torch.cat([self.prompts, torch.stack(self.written, 1)], 1)

    def cache_bytes(self) -> tuple[int, int]:
        """See Method; interaction keys are counted."""
        return self.cache.live_bytes(), self.cache.allocated_bytes()

    def live_share(self) -> float:
        """See Method."""
        return self.cache.live_tokens().double().mean().item() / self.cache.get_seq_length()
