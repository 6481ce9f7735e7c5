"""Does decoding step by step drop exactly what one pass over whole rows drops? Twins plant a bug and must be caught."""

from __future__ import annotations

import pytest
import torch

import ctxprune
from ctxprune import kernels
from ctxprune.cache.pruned_cache import PrunedCache
from ctxprune.kernels.decode import native_path, torch_extend, torch_path
from tests.models import FAMILIES, decode, disagreement, gated, small_model, tokens

N = 32
CHUNKS = {"prompt and steps": [10] + [1] * 22, "steps alone": [1] * N, "ragged chunks": [7, 9, 1, 13, 2]}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_sets_agree_exactly_and_logits_to_rounding(family, chunks):
    model = gated(family).double()
    assert 0.2 < ctxprune.drop_times(model, tokens(2, N)).sparsity().mean() < 0.9
    wrong, worst = disagreement(model, tokens(2, N), chunks)
    assert wrong == 0 and worst < 1e-10


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_they_agree_with_protected_tokens_and_a_sliding_window(chunks):
    wrong, worst = disagreement(gated("mistral-sliding", sinks=2, recent=3).double(), tokens(2, N), chunks)
    assert wrong == 0 and worst < 1e-10


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_they_agree_when_drops_propagate_in_depth(family, chunks):
    wrong, worst = disagreement(gated(family, propagate_in_depth=True).double(), tokens(2, N), chunks)
    assert wrong == 0 and worst < 1e-10


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_position_after_an_eviction_is_the_true_one_without_being_told(family):
    wrong, worst = disagreement(gated(family).double(), tokens(2, N), CHUNKS["prompt and steps"], positions=False)
    assert wrong == 0 and worst < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_decodes_the_same_up_to_its_rounding(dtype):
    """Decisions of gates this close to zero may flip; the logits of the steps before any flip must agree."""
    model = gated().to(dtype)
    *_, (fed, cache, logits) = decode(model, tokens(2, N), CHUNKS["prompt and steps"])
    assert fed == N and logits.dtype == dtype and logits.isfinite().all()
    assert (cache.live_tokens() < N).all()
    if dtype == torch.float32:
        wrong, worst = disagreement(model, tokens(2, N), CHUNKS["prompt and steps"])
        assert wrong == 0 and worst < 1e-4


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
@torch.no_grad()
def test_dense_mode_decodes_like_the_original_model(chunks):
    ids = tokens(2, N)
    whole = small_model().double()(ids).logits
    model = gated().double()
    with ctxprune.mode(model, "dense"):
        given = torch.cat([logits for _, _, logits in decode(model, ids, chunks)], dim=1)
    torch.testing.assert_close(given, whole, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_a_dropped_token_never_returns():
    before = None
    for fed, cache, _ in decode(gated(), tokens(2, N), CHUNKS["prompt and steps"]):
        held = [[set(row) for row in rows] for rows in cache.positions()]
        if before is not None:
            for layer, rows in enumerate(held):
                for row, positions in enumerate(rows):
                    assert positions - before[layer][row] == {fed - 1}
        before = held


def agrees(model, chunks: str = "prompt and steps") -> bool:
    wrong, worst = disagreement(model, tokens(2, N), CHUNKS[chunks], positions=False)
    return wrong == 0 and worst < 1e-6


def with_another_view(monkeypatch, change) -> None:
    """attend() sees change(seen, step, position, drop_time) instead of seen; (pages, n, page) and the slots' own."""
    monkeypatch.setenv("CTXPRUNE_NATIVE", "0")
    original, steps = torch_path.attend, []
    whole = torch_path.decode_attention
    monkeypatch.setitem(
        kernels.IMPLEMENTATIONS["decode_attention"],
        "torch",
        lambda *given: steps.append(given[6]) or whole(*given),
    )

    def attend(query, pages, order, seen, scale):
        step = steps[-1][order.row][:, None, None]
        position, drop_time = (t[order.pages][:, None] for t in (pages.position, pages.drop_time))
        return original(query, pages, order, change(seen, step, position, drop_time), scale)

    monkeypatch.setattr(torch_path, "attend", attend)


def test_twin_the_same_view_is_not_caught(monkeypatch):
    with_another_view(monkeypatch, lambda seen, step, position, drop_time: (position >= 0) & (drop_time > step))
    assert agrees(gated().double())


BUGS = {
    "a drop that acts one step late": lambda seen, step, position, drop_time: seen | (drop_time == step),
    "an eviction before the step's own attention": lambda seen, step, position, drop_time: (
        seen & ((drop_time > step + 1) & (position != step - 2) | (position == step))
    ),
    "attending before the new key is there": lambda seen, step, position, drop_time: seen & (position != step),
    "a freed slot left readable": lambda seen, step, position, drop_time: seen | (position >= 0),
}


@pytest.mark.parametrize("change", BUGS.values(), ids=BUGS.keys())
def test_twin_is_caught(monkeypatch, change):
    assert agrees(gated().double())
    with_another_view(monkeypatch, change)
    assert not agrees(gated().double())


def test_twin_the_number_of_survivors_taken_for_the_position_is_caught(monkeypatch):
    model = gated().double()
    assert agrees(model)
    survivors = lambda cache, layer_idx=0: int(cache.live_tokens().max()) if cache.held else 0  # noqa: E731
    monkeypatch.setattr(PrunedCache, "get_seq_length", survivors)
    assert not agrees(model)


def test_twin_a_slot_leaked_to_the_neighbour_is_caught(monkeypatch):
    model, original = gated().double(), torch_path._write
    monkeypatch.setenv("CTXPRUNE_NATIVE", "0")
    assert agrees(model)
    leaking = lambda key, value, *others: original(key, value.flip(0), *others)  # noqa: E731
    monkeypatch.setattr(torch_path, "_write", leaking)
    assert not agrees(model)


def test_twin_a_chunk_that_forgets_what_it_dropped_is_caught(monkeypatch):
    model = gated().double()
    monkeypatch.setenv(native_path.SWITCH, "0")  # the bug is planted in the torch path
    assert agrees(model, "ragged chunks")
    monkeypatch.setattr(torch_extend, "_logits", lambda *given: torch.ones(()))
    assert not agrees(model, "ragged chunks")
