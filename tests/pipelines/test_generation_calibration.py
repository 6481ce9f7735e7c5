"""Do random gates drop what is asked of the rows that are measured?"""

from __future__ import annotations

import pytest
import torch

from pipelines.config import GenerationConfig
from pipelines.generation_benchmark import calibration, ours
from pipelines.generation_benchmark.calibration import calibrate
from pipelines.generation_benchmark.subject import random_subject

SIZES = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "intermediate": 48, "vocab": 97, "rank": 4}


def kept(drop: float) -> torch.Tensor:
    """Shares that live after prompts of several rows were read in chunks, (layers, rows)."""
    subject = random_subject(GenerationConfig(contexts=[200], batches=[2], drops=[drop], **SIZES), torch.device("cpu"))
    prompts, model = subject.prompts(6, 200), subject.pruned[drop]
    calibrate(model, prompts, drop)
    method = ours.Ours(model, "hard", prompts, 64)
    method.read()
    assert method.live_share() == pytest.approx(method.cache.live_tokens().double().mean().item() / 200)
    return method.cache.live_tokens().double() / 200


@pytest.mark.parametrize("drop", [0.0, 0.5, 0.9])
def test_calibrated_gates_drop_what_is_asked(drop):
    """In every layer, to 0.3 points: what is reported is what the cache holds."""
    shares = kept(drop).mean(1)
    torch.testing.assert_close(shares, torch.full_like(shares, 1 - drop), rtol=0, atol=0.003)


def test_twin_gates_that_are_calibrated_on_few_rows_are_noticed(monkeypatch):
    monkeypatch.setattr(calibration, "TOKENS", 200)
    with pytest.raises(AssertionError, match="not close"):
        test_calibrated_gates_drop_what_is_asked(0.9)


def test_the_lowest_logits_are_those_of_later_queries(monkeypatch):
    monkeypatch.setattr(calibration, "BLOCK", 5)
    query, key = torch.randn(2, 2, 13, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = query @ key.transpose(1, 2) / 2  # (batch, query, key)
    wanted = logits.masked_fill(torch.ones(13, 13).triu().bool(), torch.inf).amin(1)
    torch.testing.assert_close(calibration.lowest_logits(query, key), wanted)
