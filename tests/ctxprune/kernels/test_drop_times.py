"""Is a drop time the first query that drops the key, whatever the block size, guards and document ends?"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctxprune import kernels


@st.composite
def gates(draw) -> dict[str, Tensor]:
    """Small whole numbers of rank 4: logits are exact, and often exactly 0."""
    batch, n = draw(st.integers(1, 2)), draw(st.integers(1, 17))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    query, key = (torch.randint(-2, 3, (batch, n, 4), generator=generator).double() for _ in range(2))
    column = torch.arange(n)
    guard = column + 1 + torch.randint(0, draw(st.integers(1, 6)), (batch, n), generator=generator)
    end = torch.minimum(column + 1 + torch.randint(0, 2 * n, (batch, n), generator=generator), torch.tensor(n))
    beta = torch.tensor(draw(st.integers(-3, 4)) * 0.5, dtype=torch.float64)
    return {"interaction_query": query, "interaction_key": key, "beta": beta, "guard": guard, "end": end}


def by_definition(interaction_query, interaction_key, beta, guard, end) -> list[list[int]]:
    """min{k >= guard[j] : x[k, j] <= 0}, at most end[j]."""
    x = interaction_query @ interaction_key.transpose(1, 2) / interaction_query.shape[-1] ** 0.5 + beta
    batch, n = guard.shape
    times = []
    for b in range(batch):
        deaths = [[k for k in range(int(guard[b, j]), n) if x[b, k, j] <= 0] for j in range(n)]
        times.append([min([int(end[b, j]), *deaths[j][:1]]) for j in range(n)])
    return times


@settings(max_examples=40, deadline=None)
@given(gates(), st.sampled_from([1, 3, 8, 256]))
def test_both_implementations_find_the_first_dropping_query(inputs, block):
    wanted = by_definition(**inputs)
    with mock.patch("ctxprune.kernels.liveness.torch_path.BLOCK", block):
        assert kernels.drop_times(**inputs).tolist() == wanted
    assert kernels.drop_times(**inputs, impl="reference").tolist() == wanted


@settings(max_examples=30, deadline=None)
@given(gates(), st.floats(0, 3))
def test_raising_beta_never_makes_a_drop_earlier(inputs, rise):
    higher = {**inputs, "beta": inputs["beta"] + rise}
    assert (kernels.drop_times(**higher) >= kernels.drop_times(**inputs)).all()


@settings(max_examples=20, deadline=None)
@given(gates())
def test_a_token_never_drops_itself_nor_before_its_guard(inputs):
    closed = {**inputs, "beta": torch.tensor(-1e4, dtype=torch.float64)}
    times = kernels.drop_times(**closed)
    assert torch.equal(times, torch.minimum(inputs["guard"], inputs["end"]))
    assert (times > torch.arange(times.shape[1])).all()


@settings(max_examples=20, deadline=None)
@given(gates())
def test_later_tokens_change_no_earlier_drop(inputs):
    """Drop times of a prefix are those of the whole, as far as the prefix sees."""
    n = inputs["guard"].shape[1]
    part = (n + 1) // 2
    whole = kernels.drop_times(**inputs)
    prefix = kernels.drop_times(**{k: v[:, :part] if v.ndim else v for k, v in inputs.items()})
    assert torch.equal(prefix.clamp(max=part), whole[:, :part].clamp(max=part))


def test_a_logit_of_exactly_zero_drops():
    one = torch.ones(1, 3, 1)
    assert kernels.drop_times(one, one, torch.tensor(-1.0)).tolist() == [[1, 2, 3]]
    assert kernels.drop_times(one, one, torch.tensor(-1.0 + 1e-6)).tolist() == [[3, 3, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_gates_are_decided_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 40, 8, generator=generator).to(dtype) for _ in range(2))
    beta = torch.tensor(0.5, dtype=dtype)
    times = kernels.drop_times(query, key, beta)
    assert torch.equal(times, kernels.drop_times(query.float(), key.float(), beta.float()))
    x = query.double() @ key.double().transpose(1, 2) / 8**0.5 + 0.5
    assert x.abs().min() > 1e-6  # no logit so close to 0 that rounding may decide
    assert torch.equal(times, kernels.drop_times(query, key, beta, impl="reference"))


@pytest.mark.parametrize("name", ["guard", "end"])
def test_a_wrong_shape_is_refused_by_name(name):
    gate = torch.zeros(2, 5, 4)
    with pytest.raises(ValueError, match=name):
        kernels.drop_times(gate, gate, torch.tensor(0.0), **{name: torch.zeros(2, 4, dtype=torch.long)})
    with pytest.raises(ValueError, match="interaction_key"):
        kernels.drop_times(gate, gate[:, :4], torch.tensor(0.0))
