"""Does decoding step by step drop exactly what one pass over whole rows drops? Twins plant a bug and must be caught."""

from __future__ import annotations

import pytest
import torch

import ctxprune
from ctxprune import decoding
from ctxprune.cache import PrunedCache, Slots
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
        held = [[{p for p in row.tolist() if p >= 0} for row in slots.position] for slots in cache.slots]
        if before is not None:
            for layer, rows in enumerate(held):
                for row, positions in enumerate(rows):
                    assert positions - before[layer][row] == {fed - 1}
        before = held


def agrees(model) -> bool:
    wrong, worst = disagreement(model, tokens(2, N), CHUNKS["prompt and steps"], positions=False)
    return wrong == 0 and worst < 1e-6


def test_twin_a_drop_that_acts_one_step_late_is_caught(monkeypatch):
    model, original = gated().double(), decoding._visible_slots
    assert agrees(model)

    def late(slots, wrapper, position, gates):
        now, decided = original(slots, wrapper, position, gates), getattr(slots, "decided", None)
        slots.decided = now
        if decided is None:
            return slots.live()[:, None, :]
        grown = now.shape[2] - decided.shape[2]
        return slots.live()[:, None, :] & torch.nn.functional.pad(decided, (0, grown), value=True)

    monkeypatch.setattr(decoding, "_visible_slots", late)
    assert not agrees(model)


def test_twin_the_number_of_survivors_taken_for_the_position_is_caught(monkeypatch):
    model = gated().double()
    assert agrees(model)
    survivors = lambda cache, layer_idx=0: int(cache.live_tokens().max()) if cache.slots else 0  # noqa: E731
    monkeypatch.setattr(PrunedCache, "get_seq_length", survivors)
    assert not agrees(model)


def test_twin_a_freed_slot_left_readable_is_caught(monkeypatch):
    model = gated().double()
    assert agrees(model)
    monkeypatch.setattr(Slots, "visible", lambda slots: torch.ones_like(slots.live())[:, None, None, :])
    assert not agrees(model)


def test_twin_a_slot_freed_in_the_wrong_row_is_caught(monkeypatch):
    model, original = gated().double(), decoding._visible_slots
    assert agrees(model)
    monkeypatch.setattr(decoding, "_visible_slots", lambda *a: original(*a).flip(0) & a[0].live()[:, None, :])
    assert not agrees(model)
