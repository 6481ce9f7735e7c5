"""Is the kernels' benchmark fair: the same inputs for all, right results before any time, memory really measured?"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import kernels
from pipelines import kernel_benchmark, output
from pipelines.config import Config, KernelsConfig
from pipelines.kernel_peers import Peer, Problem, peers, reference_formulation, reference_made_strong

CPU = torch.device("cpu")
SMALL = KernelsConfig(lengths=[48], heads=4, kv_heads=2, width=8, rank=4, drops=[0.0, 0.7])


def given(alpha: float, dropped: float = 0.7, dtype=torch.float64) -> Problem:
    made = kernel_benchmark.problem(SMALL, 40, dropped, CPU, dtype)
    return dataclasses.replace(made, alpha=alpha)


@pytest.mark.parametrize("forward", [reference_formulation, reference_made_strong])
@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_peers_with_gates_compute_what_we_compute(forward, alpha):
    """Where 25 bisections are accurate; at a large alpha the published formulation is not."""
    problem = given(alpha)
    ours = kernel_benchmark._results(Peer("", lambda p: kernels.pruned_attention(*p.tensors(), p.alpha), True), problem)
    theirs = kernel_benchmark._results(Peer("", forward, True), problem)
    for name, mine, other in zip(("output", *"qkv", "iq", "ik", "beta"), ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("dropped", [0.3, 0.9])
def test_the_problem_drops_what_is_asked(dropped):
    problem = kernel_benchmark.problem(SMALL, 300, dropped, CPU, torch.float32)
    gates = (problem.interaction_query, problem.interaction_key, problem.beta)
    assert kernel_benchmark._share_dropped(*gates) == pytest.approx(dropped, abs=0.01)
    lives = kernels.drop_times(*gates) - torch.arange(300)
    assert (lives == 1).any() and (lives > 150).any(), "heavy-tailed: some go at once, some stay"


def test_at_the_start_nothing_is_dropped():
    problem = kernel_benchmark.problem(SMALL, 300, 0.0, CPU, torch.float32)
    assert kernel_benchmark._share_dropped(problem.interaction_query, problem.interaction_key, problem.beta) == 0.0


def run(monkeypatch, capsys, **changes) -> tuple[int, list[dict]]:
    config = Config(kernels=dataclasses.replace(SMALL, **changes), format="json")
    config.benchmark.repeats = 1
    monkeypatch.setattr(output, "_stdout", None)
    code = kernel_benchmark.main(config)
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_peer_has_a_record_with_its_numbers_or_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(kernel_benchmark, "peak_memory", lambda *_: 7)
    code, (parity, *records) = run(monkeypatch, capsys)
    assert code == 0 and parity["passed"] and parity["error"] < 2e-5
    assert [r["peer"] for r in records] == [peer.name for peer in peers(CPU)] * 2
    for record in records:
        assert {"n", "dropped", "alpha", "machine", "versions", "gated"} <= record.keys()
        if "absent" not in record:
            low, high = record["both_ms_spread"]
            assert 0 < low <= record["both_ms"] <= high and record["forward_ms"] > 0 and record["peak_bytes"] == 7
    assert {r["peer"] for r in records if "absent" not in r} >= {"reference formulation", "SDPA, no gates"}


def test_wrong_results_are_not_timed(monkeypatch, capsys):
    right = kernels.IMPLEMENTATIONS["pruned_attention"]["torch"]

    def wrong(*arguments):
        out, alive = right(*arguments)
        return out * 1.001, alive

    monkeypatch.setitem(kernels.IMPLEMENTATIONS["pruned_attention"], "torch", wrong)
    code, records = run(monkeypatch, capsys)
    assert code == 1 and [record["kind"] for record in records] == ["parity"] and not records[0]["passed"]


def test_a_peer_that_would_not_fit_is_left_out_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(kernel_benchmark, "peak_memory", lambda *_: 7)
    _, (_, *records) = run(monkeypatch, capsys, largest_gb=1e-6, drops=[0.7])
    left_out = {record["peer"]: record["absent"] for record in records if "absent" in record}
    assert "largest_gb" in left_out["reference formulation"] and "ctxprune torch" not in left_out


@pytest.mark.slow
def test_peak_memory_is_that_of_the_tensors_in_flight():
    settings = dataclasses.replace(SMALL, heads=8, kv_heads=8, width=16)
    full = kernel_benchmark.peak_memory("reference formulation", settings, 1024, 0.7, CPU)
    ours = kernel_benchmark.peak_memory("ctxprune torch", settings, 1024, 0.7, CPU)
    assert full > 3 * 8 * 1024 * 1024 * 4, "weights, their gradient and the logits of 8 heads at least"
    assert 0 < ours < full
