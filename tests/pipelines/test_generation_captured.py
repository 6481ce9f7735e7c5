"""Are captured steps held against others before anything is timed? On a CPU that plays a GPU."""

from __future__ import annotations

from functools import partial

import pytest

from ctxprune.cache.layer_cache import LayerCache
from ctxprune.generation.captured import StepRunner
from pipelines.generation_benchmark import lines, parity
from tests import recorded_steps
from tests.models import gated, tokens


def share_of(monkeypatch, capture) -> float | None:
    monkeypatch.setattr(LayerCache, "looks_ahead", True)
    monkeypatch.setattr("pipelines.generation_benchmark.ours.StepRunner", partial(StepRunner, capture=capture))
    with recorded_steps.one_kernel(monkeypatch):
        return parity._played(gated().eval(), tokens(2, 40))


def test_captured_steps_write_the_same(monkeypatch):
    assert share_of(monkeypatch, recorded_steps.capture) == 1.0


def test_a_graph_that_does_nothing_is_found(monkeypatch):
    def empty(step):
        recorded_steps.capture(step)
        return lambda: None

    assert share_of(monkeypatch, empty) < parity.PLAYED


def test_without_a_gpu_there_is_nothing_to_compare():
    assert parity._played(gated().eval(), tokens(2, 40)) is None


@pytest.mark.parametrize("share, said", [(None, False), (0.75, True)])
def test_the_line_says_so(share, said):
    record = {"same_tokens": True, "error": 0.0, "allowed": 1e-9, "passed": True, "dropped": 0.5}
    assert (
        "75% of tokens the same from captured steps" in lines.parity(record | {"same_tokens_played": share})
    ) == said
