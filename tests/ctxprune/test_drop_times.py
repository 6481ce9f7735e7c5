"""Do drop times count sparsity the way a person would, pair by pair?"""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import ctxprune
from ctxprune import DropTimes, UserError
from ctxprune.drop_time import forward_with_drop_times
from ctxprune.retrofitting import state_of
from tests.models import GPT2, LAYERS, gated, open_gates, small_model, tokens


@st.composite
def random_times(draw) -> DropTimes:
    """Two layers, two rows; a key may be dropped by any later query of its document, or survive the row."""
    n = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    column = torch.arange(n)
    cut = torch.tensor([[draw(st.integers(1, n))], [n]])
    document_end = torch.where(column < cut, cut, n)
    drop = column + 1 + torch.randint(0, n + 2, (2, 2, n), generator=generator)
    return DropTimes(torch.minimum(drop, torch.where(document_end < n, document_end, 10**6)), document_end)


@settings(deadline=None)
@given(random_times())
def test_sparsity_live_and_counts_are_those_of_brute_force(taken):
    layers, batch, n = taken.drop_time.shape
    for layer in range(layers):
        kept = pairs = 0
        for row in range(batch):
            times, end = taken.drop_time[layer, row].tolist(), taken.document_end[row].tolist()
            for query in range(n):
                seen = [j <= query < times[j] for j in range(n)]
                assert taken.live(query)[layer, row].tolist() == seen
                assert taken.live_counts()[layer, row, query] == sum(seen)
                kept += sum(seen[:query])
                pairs += sum(j < query < end[j] for j in range(n))
            assert taken.kept_pairs()[layer, row] == sum(max(0, min(t, n) - j - 1) for j, t in enumerate(times))
        assert taken.sparsity()[layer].item() == pytest.approx(1 - kept / max(1, pairs))


def test_open_gates_drop_nothing():
    model = gated()
    open_gates(model)
    taken = ctxprune.drop_times(model, tokens(2, 20))
    assert taken.drop_time.shape == (LAYERS, 2, 20) and taken.document_end.unique().tolist() == [20]
    assert taken.sparsity().tolist() == [0.0] * LAYERS


def test_drop_times_of_the_first_layer_are_those_of_its_gate():
    model, ids = gated(), tokens(2, 20)
    layer = model.model.layers[0]
    query, key, beta = layer.self_attn.rule.gate(layer.input_layernorm(model.model.embed_tokens(ids)))
    x = query @ key.transpose(1, 2) / 2.0 + beta
    times = ctxprune.drop_times(model, ids).drop_time[0]
    for row in range(2):
        for j in range(20):
            assert times[row, j] == next((k for k in range(j + 1, 20) if x[row, k, j] <= 0), 20)


def test_packed_and_padded_rows_end_where_their_documents_end():
    model, ids = gated(), tokens(1, 12)
    position = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = ctxprune.drop_times(model, ids, position_ids=position)
    assert packed.document_end.tolist() == [[5] * 5 + [12] * 7]
    assert (packed.drop_time[:, :, :5] <= 5).all()
    apart = ctxprune.drop_times(model, ids[:, 5:]).drop_time + 5
    assert torch.equal(packed.drop_time[:, :, 5:], apart)
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, :5] = 0
    padded = ctxprune.drop_times(model, ids, attention_mask=mask, position_ids=position)
    assert torch.equal(padded.drop_time[:, :, 5:], apart)


def test_the_same_pass_gives_the_deployed_logits_whatever_the_models_mode():
    model, ids = gated(), tokens(2, 20)
    with torch.no_grad():
        wanted = model(ids).logits
    times, logits = forward_with_drop_times(model.train(), ids)
    assert torch.equal(logits, wanted)
    assert torch.equal(times.drop_time, ctxprune.drop_times(model.eval(), ids).drop_time)
    assert state_of(model).record is None and state_of(model).mode == "auto"


def test_dropout_is_off_while_drop_times_are_read_and_every_module_is_as_it_was_afterwards():
    """As in a training loop, whose thresholds are settled on them."""
    torch.manual_seed(0)
    config = tf.GPT2Config(**{**GPT2, "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.0})
    model = ctxprune.retrofit(tf.GPT2LMHeadModel(config), ctxprune.GateConfig(rank=4, beta=0.0)).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    ids = tokens(2, 20)
    first, second = (forward_with_drop_times(model, ids) for _ in range(2))
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    model.eval()
    taken, logits = forward_with_drop_times(model, ids)
    for again in (first, second):
        assert torch.equal(again[0].drop_time, taken.drop_time) and torch.equal(again[1], logits)
    assert taken.sparsity().max() > 0


def test_a_failed_pass_leaves_no_recording_behind():
    model = gated()
    with pytest.raises(IndexError):
        ctxprune.drop_times(model, torch.tensor([[10**6]]))
    assert state_of(model).record is None


def test_a_model_without_retrofit_is_refused():
    with pytest.raises(UserError, match="not retrofitted"):
        ctxprune.drop_times(small_model(), tokens(1, 4))
