"""Does leaving out keys that are gone change nothing but the work? On a GPU, else interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxprune import kernels
from ctxprune.kernels.soft_attention import triton_path
from ctxprune.kernels.soft_attention.triton_segments import segment_rows, segments, slots
from ctxprune.kernels.soft_attention.triton_shape import Shape
from ctxprune.kernels.soft_attention.triton_tiles import DEAD, GONE
from tests.ctxprune.kernels.problems import assert_same, documents, inputs, run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N = 100


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    use(monkeypatch)


def use(monkeypatch, segment: int = 32, tile: tuple[int, int] = (16, 16), workspace: int = 1 << 24) -> None:
    monkeypatch.setitem(
        kernels.IMPLEMENTATIONS["pruned_attention"],
        "triton",
        lambda *arguments: triton_path.pruned_attention(*arguments, tile=tile, workspace=workspace, segment=segment),
    )


def problem(n: int = N, beta: float = 0.5, dtype=torch.float32, seed: int = 0):
    return [tensor.to(DEVICE) for tensor in inputs(2, 1, n, 2, dtype, beta=beta, seed=seed)]


def packed_documents(n: int = N):
    return {name: tensor.to(DEVICE) for name, tensor in documents(n).items()}


def mostly_gone(n: int = 128):
    """One key in eight, spread over all tiles, lives for ever; the others die by the next query but three."""
    tensors = problem(n)
    lives = torch.arange(n, device=DEVICE) % 8 == 3
    tensors[3] = torch.ones_like(tensors[3])
    tensors[4] = torch.where(lives[:, None], 9.0, -9.0).expand_as(tensors[4]).contiguous()
    guard = (torch.arange(n, device=DEVICE) + 3).expand(2, n)
    return tensors, {"guard": guard}


@pytest.mark.parametrize(("alpha", "beta"), [(3.0, -1.0), (1.0, 0.5), (3.0, 2.0)])
def test_output_alive_and_all_gradients(alpha, beta):
    """Other keys die in either row of the batch."""
    tensors = problem(beta=beta)
    assert_same(run(tensors, alpha, "triton"), run(tensors, alpha, "reference"), 2e-5)


@pytest.mark.parametrize(("tile", "workspace"), [((16, 32), 1), ((32, 16), 1 << 24)])
def test_packed_documents_in_all_tiles_and_passes(tile, workspace, monkeypatch):
    use(monkeypatch, 32, tile, workspace)
    tensors, plan = problem(), packed_documents()
    assert_same(run(tensors, 2.0, "triton", **plan), run(tensors, 2.0, "reference", **plan), 2e-5)


@pytest.mark.parametrize("n", [32, 33, 63, 97])
def test_lengths_that_cut_the_last_segment_anywhere(n):
    tensors, plan = problem(n), packed_documents(n)
    assert_same(run(tensors, 1.5, "triton", **plan), run(tensors, 1.5, "reference", **plan), 2e-5)


@pytest.mark.parametrize("beta", [-1e4, 1e4])
def test_everything_gone_and_nothing_gone(beta):
    tensors = problem(beta=beta)
    found = run(tensors, 1.5, "triton")
    assert_same(found, run(tensors, 1.5, "reference"), 2e-5)
    assert found["alive"].tolist() == [0.0 if beta < 0 else N * (N - 1) / 2] * 2


def test_segments_change_little_in_half_precision(monkeypatch):
    tensors, plan = problem(70, dtype=torch.float16), packed_documents(70)
    found = run(tensors, 2.0, "triton", **plan)
    use(monkeypatch, segment=70)
    assert_same(found, run(tensors, 2.0, "triton", **plan), 2e-3)


def test_uninitialised_memory_is_never_read():
    """Copies are made into fresh memory, and not of tiles that are all gone."""
    tensors, plan = mostly_gone(80)
    wanted = run(tensors, 1.5, "triton", **plan)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4, device=DEVICE).isnan().all()  # fresh memory is poisoned
        poisoned = run(tensors, 1.5, "triton", **plan)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(poisoned, wanted, 0.0)


def visited(segment: int) -> int:
    """Tiles that hold something to see, of 128 queries and keys of which one in eight lives."""
    (query, key, value, iq, ik, beta), plan = mostly_gone()
    e, times = torch.full((1,), 0.5, device=DEVICE), torch.full((2, 128), 128, dtype=torch.int32, device=DEVICE)
    _, _, _, _, tile_class, _ = triton_path.forward_operator(
        query, key, value, iq, ik, beta, e, plan["guard"].int().contiguous(), times, True, 2, 0.3, 16, 16, 1 << 24,
        segment,
    )  # fmt: skip
    return int((tile_class != DEAD.value).sum())


def test_tiles_of_gone_keys_are_not_visited():
    """In their own order every tile holds a living key: all 2 x 36 are visited. With a look every 16 rows there remain
    the 8 on the diagonal and one per later segment, but in the last, where 14 live for ever and 3 not yet gone."""
    assert visited(segment=128) == 2 * 36
    assert visited(segment=16) == 2 * (8 + 7 + 1)


def test_slots_hold_the_living_keys_first_and_own_keys_in_place():
    carry = torch.tensor([[0.0, GONE.value, -3.0, -126.0, -125.0, 0.0, 0.0, 0.0]])
    end = torch.tensor([[7, 7, 4, 7, 7, 7, 7]], dtype=torch.int32)
    assert slots(carry, end, 5).tolist() == [[0, 4, 1, 2, 3, 5, 6, 7]]
    assert carry[0, 2] == GONE.value  # its document has ended
    assert slots(carry, end, 0).tolist() == [list(range(8))]


def test_segments_are_whole_tiles_and_short_rows_are_one():
    query, gate = torch.zeros(1, 1, 200, 8), torch.zeros(1, 200, 4)
    shape = Shape.of(query, query, gate, 16, 64)
    assert segments(shape, 80) == [(0, 8), (8, 5)]  # 128 rows: two tiles of 64 keys
    assert segment_rows(1024, heads=1000, rows=64) == 1024
    assert segment_rows(1025, heads=1000, rows=64) == 512
    assert segment_rows(8192, heads=12, rows=64) == 22 * 64  # 264 blocks of queries


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_problem_has_the_references_answer(data, monkeypatch):
    """Lengths, tiles, segments, documents, protected tokens and gates at random, some exactly 0 or at the edges."""
    n, alpha = data.draw(st.integers(1, 50)), data.draw(st.sampled_from([1.5, 2.0, 3.0]))
    tile = data.draw(st.sampled_from([(16, 16), (16, 32), (32, 16)]))
    use(monkeypatch, data.draw(st.sampled_from([32, 64])), tile, data.draw(st.sampled_from([1, 1 << 24])))
    tensors = problem(n, seed=data.draw(st.integers(0, 10**6)))
    tensors[3] *= data.draw(st.sampled_from([0.0, 1.0]))
    edge = 1.0 / (alpha - 1.0)
    tensors[5].fill_(data.draw(st.sampled_from([0.0, edge, -edge, 0.7, -1.0])))
    column = torch.arange(n, device=DEVICE)
    end = column + data.draw(st.sampled_from([1, 7, 40, 100]))
    guard = column + data.draw(st.sampled_from([1, 3, 100]))
    plan = {"end": end.expand(2, n), "guard": guard.expand(2, n)}
    assert_same(run(tensors, alpha, "triton", **plan), run(tensors, alpha, "reference", **plan), 5e-5)
