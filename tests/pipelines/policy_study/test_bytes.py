"""Is a budget the same bytes for every way to prune, whatever it keeps beside keys and values?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ctxprune
from ctxprune import PrunedCache, tasks
from ctxprune.policies import DenseConfig
from ctxprune.retrofitting import wrappers
from pipelines.policy_study import methods, small_model
from pipelines.policy_study.measure import BATCH, measure

TASK = tasks.RecallConfig(length=32, facts=3, decoys=2, keys=8, values=8, fillers=8)
ROWS = 128


def varied(model, task, share, seed) -> None:
    """Gates that drop some keys and keep others, as if they had learned to."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for wrapper in wrappers(model):
            for linear in (wrapper.rule.gate.query, wrapper.rule.gate.key):
                linear.weight.normal_(0.0, 0.5, generator=generator)


def bytes_held(model) -> int:
    total = 0
    for index in range(ROWS // BATCH):
        rows, held = TASK.batch("test", 0, index, BATCH), PrunedCache(page=16)
        held.prompt = torch.full((BATCH,), rows.end)
        with torch.no_grad():
            model(rows.input_ids[:, : rows.end], past_key_values=held, use_cache=True)
        total += held.live_bytes()
    return total


def bytes_of_gates(monkeypatch) -> tuple[float, float]:
    """What gates at a half of the bytes keep of them, by the table and in the cache."""
    monkeypatch.setattr("pipelines.policy_study.thresholds.ROWS", ROWS)
    (gates,) = methods.named(["learned gates"])
    torch.manual_seed(0)
    model = methods.retrofitted(
        replace(gates, prepare=varied), small_model.build(TASK.vocab_size, small_model.Shape(), 0), TASK, 0.5, 0
    )
    dense = ctxprune.retrofit(small_model.build(TASK.vocab_size, small_model.Shape(), 0), DenseConfig())
    said = measure(model, TASK, ROWS).kept.mean().item() * methods.key_bytes(model)
    return said, bytes_held(model) / bytes_held(dense)


def test_gates_have_the_bytes_of_the_others_and_their_cache_holds_them(monkeypatch):
    said, held = bytes_of_gates(monkeypatch)
    assert said == pytest.approx(held, rel=1e-9) and said == pytest.approx(0.5, rel=0.01)


def test_with_the_same_number_of_keys_they_would_have_more(monkeypatch):
    monkeypatch.setattr(methods, "key_bytes", lambda model: 1.0)
    _, held = bytes_of_gates(monkeypatch)
    assert held > 1.05 * 0.5


RULES = [one for one in methods.METHODS if not (one.prepare or one.around or one.shown or one.adaptive)]


@pytest.mark.parametrize("method", RULES, ids=[method.name for method in RULES])
def test_the_cache_of_every_rule_holds_the_bytes_of_its_keys_alone(method):
    """Whatever it counts on the way (sums, ages, norms) is gone where the questions begin, or would be bytes."""
    model = ctxprune.retrofit(small_model.build(TASK.vocab_size, small_model.Shape(), 0), method.policy(0.5))
    dense = ctxprune.retrofit(small_model.build(TASK.vocab_size, small_model.Shape(), 0), DenseConfig())
    kept = measure(model, TASK, ROWS).kept.mean().item()
    assert methods.key_bytes(model) == 1.0
    assert bytes_held(model) / bytes_held(dense) == pytest.approx(kept, rel=1e-6)


def test_a_share_of_bytes_is_handed_on_as_a_share_of_keys(monkeypatch):
    monkeypatch.setattr("pipelines.policy_study.thresholds.ROWS", ROWS)
    asked = []

    def spying(model, task, share, seed) -> None:
        varied(model, task, share, seed)
        asked.append(share)

    (gates,) = methods.named(["learned gates"])
    model = small_model.build(TASK.vocab_size, small_model.Shape(), 0)
    model = methods.retrofitted(replace(gates, prepare=spying), model, TASK, 0.5, 0)
    assert asked == [pytest.approx(0.5 / methods.key_bytes(model))] and methods.key_bytes(model) > 1.05
