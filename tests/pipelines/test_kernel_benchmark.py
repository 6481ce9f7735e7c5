"""Is the kernels' benchmark fair: the same inputs for all, right results before any time, memory really measured?"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from ctxprune import kernels
from ctxprune.kernels.decode import native_path
from pipelines import kernel_benchmark, output
from pipelines.config import Config, KernelsConfig
from pipelines.kernel_benchmark import OPERATIONS, clock, lines, memory, problem
from pipelines.kernel_benchmark.formulation import (
    plain_formulation,
    reference_formulation,
    reference_made_strong,
)
from pipelines.kernel_benchmark.problem import Problem, share_dropped, synthetic
from pipelines.kernel_benchmark.training import ours, trained

CPU = torch.device("cpu")
SMALL = KernelsConfig(
    lengths=[48], heads=4, kv_heads=2, width=8, rank=4, drops=[0.0, 0.7], decode_batch=2, memory=False
)


def given(alpha: float, **times) -> Problem:
    made = synthetic(SMALL, 40, 0.7, CPU, 1).to(CPU, torch.float64)
    return dataclasses.replace(made, alpha=alpha, **times)


GUARD = torch.arange(1, 41)[None] + 5
END = torch.where(torch.arange(40) < 20, 20, 40)[None]


@pytest.mark.parametrize("forward", [reference_formulation, reference_made_strong, plain_formulation])
@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("times", [{}, {"guard": GUARD, "end": END}], ids=["plain", "guards and ends"])
def test_peers_with_gates_compute_what_we_compute(forward, alpha, times):
    """Where 25 bisections are accurate; at a large alpha the published formulation is not."""
    problem = given(alpha, **times)
    mine, theirs = (trained(f, True)(problem).passes["both"]() for f in (ours("auto"), forward))
    for name, one, other in zip(("output", *"qkv", "iq", "ik", "beta"), mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("dropped", [0.3, 0.9])
def test_the_problem_drops_what_is_asked(dropped):
    made = synthetic(SMALL, 300, dropped, CPU, 1)
    assert share_dropped(made) == pytest.approx(dropped, abs=0.01)
    lives = problem.drop_times(made) - torch.arange(300)
    assert (lives == 1).any() and (lives > 150).any(), "heavy-tailed: some go at once, some stay"


def test_at_the_start_nothing_is_dropped():
    assert share_dropped(synthetic(SMALL, 300, 0.0, CPU, 1)) == 0.0


def run(monkeypatch, capsys, format="json", **changes) -> tuple[int, list]:
    config = Config(kernels=dataclasses.replace(SMALL, **changes), format=format)
    config.benchmark.repeats = 2
    monkeypatch.setattr(output, "_stdout", None)
    code = kernel_benchmark.main(config)
    printed = capsys.readouterr().out.splitlines()
    return code, [json.loads(line) for line in printed] if format == "json" else printed


def test_every_peer_has_a_record_with_its_numbers_or_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(memory, "peak_memory", lambda *_: 7)
    code, records = run(monkeypatch, capsys, memory=True)
    parities, records = records[:3], records[3:]
    assert code == 0 and [one["operation"] for one in parities] == list(OPERATIONS)
    assert all(one["passed"] and one["error"] < 2e-5 for one in parities)
    wanted = [(name, peer.name) for name, one in OPERATIONS.items() for peer in one.peers(SMALL, CPU, 4)]
    assert [(r["operation"], r["peer"]) for r in records] == wanted * 2, "one problem after the other"
    for record in records:
        assert {"n", "dropped", "alpha", "machine", "versions", "gated", "asked"} <= record.keys()
        assert record["n"] == 48 and record["batch"] == (2 if record["operation"] == "decoding" else 1)
        if "absent" in record:
            assert any(reason in record["absent"] for reason in ("CUDA only", "kernels.flex=true"))
            continue
        main = OPERATIONS[record["operation"]].MAIN
        (lowest, highest), (low, high) = record[f"{main}_ms_spread"], record[f"{main}_ms_quantiles"]
        assert 0 < lowest <= low <= record[f"{main}_ms"] <= high <= highest
        assert ("peak_bytes" in record) == (record["operation"] != "decoding")
        assert ("gb_per_second" in record) == ("cache_bytes" in record) == (record["operation"] == "decoding")
        assert ("over_sdpa" in record) == record["peer"].startswith("ctxprune")


@pytest.mark.skipif(bool(native_path.available()), reason=f"native: {native_path.available()}")
def test_decoding_times_the_native_step_where_it_runs(monkeypatch, capsys):
    """Beside the torch path, each over its own time for every key; what it does not take is not asked of it."""
    _, records = run(monkeypatch, capsys, operations=["decoding"], drops=[0.7])
    times = {r["peer"]: r["step_ms"] for r in records if "peer" in r}
    for name in ("ctxprune native", "ctxprune torch"):
        (mine,) = (r for r in records if r.get("peer") == name)
        assert mine["over_dense"] == times[name] / times[f"{name}, every key, no gates"]
    names = [peer.name for peer in OPERATIONS["decoding"].peers(dataclasses.replace(SMALL, dtype="bfloat16"), CPU, 4)]
    assert names[0] == "ctxprune torch" and not any("native" in name for name in names)
    monkeypatch.setenv(native_path.SWITCH, "0")
    assert not any("native" in peer.name for peer in OPERATIONS["decoding"].peers(SMALL, CPU, 4))
    assert not any("native" in peer.name for peer in OPERATIONS["prefill"].peers(SMALL, CPU, 4))


def test_ratios_and_backward_are_what_the_times_say(monkeypatch, capsys):
    clocks = {"both": [5.0, 9.0, 7.0], "forward": [1.0, 2.0, 2.0]}
    record = kernel_benchmark._times(clocks, {}, "both")
    assert (record["both_ms"], record["forward_ms"], record["backward_ms"]) == (7e3, 2e3, 5e3)
    assert record["backward_ms_spread"] == [4e3, 7e3], "repeat by repeat, not median minus median"
    _, records = run(monkeypatch, capsys, drops=[0.7])
    for name, operation in OPERATIONS.items():
        mine, *others = (r for r in records if r.get("operation") == name and "peer" in r and "absent" not in r)
        times = {r["peer"]: r[f"{operation.MAIN}_ms"] for r in [mine, *others]}
        assert mine["over_sdpa"] == times[mine["peer"]] / times["SDPA, no gates"]
        if name == "decoding":
            dense = next(time for peer, time in times.items() if "every key" in peer)
            assert mine["over_reference"] is None and mine["over_dense"] == times[mine["peer"]] / dense
        else:
            assert mine["over_reference"] == times[mine["peer"]] / times["reference formulation"]


def test_people_read_one_comparison_per_operation(monkeypatch, capsys):
    _, printed = run(monkeypatch, capsys, "text", drops=[0.7])
    told = [line for line in printed if "x SDPA without gates" in line]
    assert [line.split(",")[0] for line in told] == list(OPERATIONS)
    assert all("x the reference formulation" in line for line in told[:2]) and "median ms" in printed[3]


def test_records_can_be_read_again_as_the_table_that_was_printed(monkeypatch, capsys):
    monkeypatch.setattr(clock, "seconds", lambda *_: 0.002)
    _, printed = run(monkeypatch, capsys, "text")
    _, records = run(monkeypatch, capsys)
    again = list(lines.table(records))
    assert [line for line in again if "GB/s" not in line] == [line for line in printed if "GB/s" not in line]
    assert len(again) == len(printed) and sum(line.startswith("operation") for line in again) == 1
    command = [sys.executable, "-W", "error", "-m", "pipelines.kernel_benchmark.show"]
    stored = "\n".join(map(json.dumps, records))
    assert subprocess.run(command, input=stored, capture_output=True, text=True).stdout.splitlines() == again


WRONG = {
    "training": ("pruned_attention", lambda result: (result[0] * 1.001, result[1])),
    "prefill": ("drop_time_attention", lambda result: result * 1.001),
    "decoding": ("decode_attention", lambda result: result * 1.001),
}


@pytest.mark.parametrize("operation", WRONG)
def test_wrong_results_are_not_timed(operation, monkeypatch, capsys):
    """Nothing at all is timed, whichever operation is wrong, and only that one is said to be."""
    name, spoil = WRONG[operation]
    right = kernels.IMPLEMENTATIONS[name]["torch"]
    monkeypatch.setitem(kernels.IMPLEMENTATIONS[name], "torch", lambda *arguments: spoil(right(*arguments)))
    monkeypatch.setattr(clock, "seconds", lambda *_: pytest.fail("something was timed"))
    code, records = run(monkeypatch, capsys)
    assert code == 1 and [record["kind"] for record in records] == ["parity"] * 3
    assert [record["operation"] for record in records if not record["passed"]] == [operation]


def test_drop_times_that_are_late_are_not_timed(monkeypatch, capsys):
    """What is allowed must not come from the code that is judged."""
    right = kernels.IMPLEMENTATIONS["drop_times"]["torch"]

    def late(*arguments):
        return (right(*arguments) + 1).clamp(max=arguments[0].shape[1])

    monkeypatch.setitem(kernels.IMPLEMENTATIONS["drop_times"], "torch", late)
    code, records = run(monkeypatch, capsys, operations=["prefill"], drops=[0.7])
    assert code == 1 and not records[0]["passed"]


def test_gates_that_are_wrong_are_not_timed(monkeypatch, capsys):
    from ctxprune.kernels.soft_attention import torch_gates

    right = torch_gates.log_alpha_sigmoid
    monkeypatch.setattr(torch_gates, "log_alpha_sigmoid", lambda x, alpha: right(x * 1.001, alpha))
    code, records = run(monkeypatch, capsys, operations=["training"])
    assert code == 1 and not records[0]["passed"]


def test_a_peer_that_would_not_fit_is_left_out_with_the_reason(monkeypatch, capsys):
    _, records = run(monkeypatch, capsys, largest_gb=1e-6, drops=[0.7], operations=["training", "prefill"])
    left_out = {(r["operation"], r["peer"]): r["absent"] for r in records if "absent" in r}
    for key in (("training", "reference formulation"), ("prefill", "SDPA, n x n mask")):
        assert "largest_gb" in left_out[key]
    assert not any(peer.startswith("ctxprune") for _, peer in left_out)
    assert next(r for r in records if r.get("peer") == "ctxprune torch")["over_reference"] is None


def test_a_foreign_peer_that_fails_says_so_and_ours_stops_everything(monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("no kernel for\nthis")

    monkeypatch.setattr("pipelines.kernel_benchmark.prefill.scaled_dot_product_attention", broken)
    _, records = run(monkeypatch, capsys, drops=[0.7], operations=["prefill"])
    (masked,) = (record for record in records if record.get("peer") == "SDPA, n x n mask")
    assert masked["absent"] == "failed here: RuntimeError: no kernel for"
    monkeypatch.setattr("pipelines.kernel_benchmark._parity", lambda *_: True)
    monkeypatch.setitem(kernels.IMPLEMENTATIONS["drop_time_attention"], "torch", broken)
    with pytest.raises(RuntimeError, match="no kernel"):
        run(monkeypatch, capsys, drops=[0.7], operations=["prefill"])


@pytest.mark.slow
def test_peak_memory_is_that_of_the_tensors_in_flight():
    settings = dataclasses.replace(SMALL, heads=8, kv_heads=8, width=16)
    problem = synthetic(settings, 1024, 0.7, CPU, 1)
    full, ours = (
        memory.peak_memory("training", name, settings, problem, CPU)
        for name in ("reference formulation", "ctxprune torch")
    )
    assert full > 3 * 8 * 1024 * 1024 * 4, "weights, their gradient and the logits of 8 heads at least"
    assert 0 < ours < full
