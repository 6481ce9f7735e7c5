"""Do prefill's and decoding's peers see the same keys, and does each timed step start where the first one did?"""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from pipelines.config import KernelsConfig
from pipelines.kernel_benchmark import decoding, flex, formulation, pools, prefill
from pipelines.kernel_benchmark.peer import results
from pipelines.kernel_benchmark.problem import Problem, drop_times, synthetic

CPU = torch.device("cpu")
SETTINGS = KernelsConfig(heads=4, kv_heads=2, width=8, rank=4)
N = 300


def given(**times) -> Problem:
    return dataclasses.replace(synthetic(SETTINGS, N, 0.5, CPU, 3), **times)


def guarded() -> Problem:
    """Sinks that no gate may drop, others that live three queries more, and a window of the model's own."""
    column = torch.arange(N).expand(3, N)
    return given(guard=torch.where(column < 4, 2**62, column + 4), end=column + 250)


@pytest.mark.parametrize("chunk", [1, 64, 1024])
@pytest.mark.parametrize("n", [1, 63, N])
def test_sorted_keys_are_seen_by_the_same_queries(chunk, n, monkeypatch):
    monkeypatch.setattr(flex, "CHUNK", chunk)
    times = drop_times(given())[:, :n].clamp(max=n)
    row, query, key = torch.meshgrid(torch.arange(3), torch.arange(n), torch.arange(n), indexing="ij")
    in_place = flex.visible_in_place(times)(row, 0, query, key)
    assert torch.equal(in_place, formulation.visible_pairs(times))
    position = flex.sorted_order(times)
    seen = flex.visible_sorted(position, times.gather(1, position))(row, 0, query, key)
    pairs = {(b, q, int(position[b, place])) for b, q, place in seen.nonzero().tolist()}
    assert pairs == {tuple(pair) for pair in in_place.nonzero().tolist()}
    assert torch.equal(position // chunk, (torch.arange(n) // chunk).expand(3, n)), "no key leaves its chunk"


def test_sorting_makes_living_keys_a_prefix():
    """Whatever the query; in place they are scattered."""
    times = drop_times(given())
    position = flex.sorted_order(times)
    for query in (50, 290):
        alive = times.gather(1, position) > query
        assert 0 < alive.sum() < alive.numel() and (alive[:, :-1] >= alive[:, 1:]).all()
        assert not ((times > query)[:, :-1] >= (times > query)[:, 1:]).all()


@pytest.mark.parametrize("problem", [given, guarded])
def test_prefill_peers_with_gates_agree(problem, monkeypatch):
    """FlexAttention uncompiled: the same mask, slowly."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    monkeypatch.setattr(flex, "compiled", lambda device: (create_block_mask, flex_attention))
    made = problem()
    exact = prefill.ours("reference", made.inference())
    peers = [peer for peer in prefill.peers(SETTINGS, CPU, 4) if peer.gated]
    assert len(peers) == 5
    for peer in peers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is not compiled
            (found,) = results(peer.prepare(made), prefill.MAIN)
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5, msg=peer.name)


def test_flex_runs_on_a_cpu_when_asked_only():
    for asked in (False, True):
        peers = prefill.peers(dataclasses.replace(SETTINGS, flex=asked), CPU, 4)
        absent = [peer.absent for peer in peers if peer.name.startswith("FlexAttention")]
        assert len(absent) == 2 and all((reason is None) == asked for reason in absent)


@pytest.mark.parametrize("problem", [given, guarded])
def test_pools_hold_exactly_the_survivors(problem):
    made = problem().inference()
    times, held = drop_times(made), N - 1
    pages = pools.filled(made, pools.survivors(made), gated=True)
    assert pages.used.max() > pages.used.min() > pools.PAGE, "several pages"
    for row in range(3):
        slots = torch.arange(int(pages.used[row]))
        page, place = pages.table[row, slots // pools.PAGE].long(), slots % pools.PAGE
        # Not dropped by any query before the last.
        wanted = [j for j in range(held) if times[row, j] >= held]
        assert len(slots) == len(wanted)
        assert torch.equal(pages.keys[page, :, place], made.key[row, :, wanted].transpose(0, 1))
        assert torch.equal(pages.values[page, :, place], made.value[row, :, wanted].transpose(0, 1))
        assert torch.equal(pages.interaction[page, place], made.interaction_key[row, wanted])
        assert pages.table[row, int(pages.used[row]) // pools.PAGE] >= 0, "room for one more"
    given_out = pages.table[pages.table >= 0]
    assert sorted(given_out.tolist()) == list(range(len(pages.keys))), "each page to one row"


@pytest.mark.parametrize("problem", [given, guarded])
@pytest.mark.parametrize("gated", [True, False])
def test_a_step_over_pages_sees_what_the_last_query_sees(problem, gated):
    made = problem()
    step, plain = (
        results(f, decoding.MAIN) for f in (decoding.ours("torch", gated, made), decoding._plain(gated, made))
    )
    torch.testing.assert_close(step[0], plain[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(step[1], plain[1]) and (plain[1] < N).all() == gated


def test_timed_steps_start_from_the_same_state():
    """A step drops keys and takes a slot; without bringing the state back the next one would meet fewer keys."""
    made = given()
    prepared = decoding.ours("torch", True, made)
    prepared.before()
    (first,), (live,) = prepared.passes["step"](), prepared.left()
    dropped = live - 1 - pools.survivors(made).sum(1)
    assert (dropped < 0).any(), "the timed step really drops"
    for _ in range(3):
        again, still = results(prepared, "step")
        assert torch.equal(again, first) and torch.equal(still, live)
    (without,) = prepared.passes["step"]()
    assert not torch.equal(prepared.left()[0], live), "the guard is needed"
    assert without.shape == first.shape


def test_copies_take_turns_and_do_not_share_memory(monkeypatch):
    monkeypatch.setattr(pools, "copies", lambda size, device: 3)
    seen = []
    right = decoding.kernels.decode_attention

    def watched(*arguments, **names):
        seen.append(arguments[7].keys.data_ptr())
        return right(*arguments, **names)

    prepared = decoding.ours("torch", True, given())
    monkeypatch.setattr(decoding.kernels, "decode_attention", watched)
    outputs = [results(prepared, "step")[0] for _ in range(6)]
    assert len(set(seen)) == 3 and seen[:3] == seen[3:]
    assert all(torch.equal(one, outputs[0]) for one in outputs)


def test_bytes_are_those_of_living_keys():
    made = given()
    facts, dense = (decoding.ours("torch", gated, made).facts for gated in (True, False))
    times = drop_times(made)
    live, stored = int((times == N).sum()), int(pools.survivors(made).sum()) + 3
    assert facts["bytes_read"] == 4 * (live * 2 * 2 * 8 + stored * 4)
    assert facts["live_share"] == live / (3 * N)
    assert dense["bytes_read"] == decoding._sdpa(made).facts["bytes_read"] == 4 * 3 * N * 2 * 2 * 8
    assert facts["cache_bytes"] < dense["cache_bytes"]


def test_a_step_that_cannot_be_captured_is_timed_as_it_is(monkeypatch):
    """The CUDA graph itself needs a GPU; what is done with it does not."""

    def refused(step, before):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    turns, restored = ["a", "b"], []
    monkeypatch.setattr(decoding.clock, "captured", refused)
    prepared = decoding._taking_turns(turns, lambda cache: [cache], {}, True, restore=restored.append)
    assert [results(prepared, "step") for _ in range(3)] == [["a"], ["b"], ["a"]] and restored == ["a", "b", "a"]
    assert prepared.facts == {"copies": 2, "cuda_graph": False, "no_graph": "operation not permitted"}
    monkeypatch.setattr(decoding.clock, "captured", lambda step, before: lambda: ["graph", *step()])
    prepared = decoding._taking_turns(turns, lambda cache: [cache], {}, True)
    assert [results(prepared, "step") for _ in range(2)] == [["graph", "a"], ["graph", "b"]]
    assert prepared.facts["cuda_graph"]
