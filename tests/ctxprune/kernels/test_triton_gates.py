"""Do the Triton gates and drop times equal their references? On a GPU, else interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from ctxprune import kernels
from ctxprune.kernels.liveness import triton_path as times_path
from tests.ctxprune.kernels.test_alpha_sigmoid import ALPHAS, SPARSE, edge, grid
from tests.ctxprune.kernels.test_drop_times import by_definition, gates

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_gate_is_exact_to_rounding(alpha):
    x = grid(alpha).float().to(DEVICE)
    exact = kernels.alpha_sigmoid(x, alpha, impl="reference")
    assert (kernels.alpha_sigmoid(x, alpha, impl="triton") - exact).abs().max().item() <= 3e-7


@pytest.mark.parametrize("alpha", SPARSE)
def test_it_is_exactly_0_and_1_beyond_the_edges_with_no_derivative(alpha):
    limit = 1.0 / (alpha - 1.0)
    x = torch.tensor([-3.0, -1.001, 1.001, 3.0], device=DEVICE).mul_(limit).requires_grad_()
    gate = kernels.alpha_sigmoid(x, alpha, impl="triton")
    assert gate.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert torch.autograd.grad(gate.sum(), x)[0].tolist() == [0.0] * 4


@pytest.mark.parametrize("alpha", ALPHAS)
def test_its_derivative_is_the_torch_paths(alpha):
    """Inside the band; within 1e-3 of an edge the rounding of x decides."""
    x = torch.linspace(-0.999, 0.999, 513, device=DEVICE) * min(edge(alpha), 30.0)
    found, wanted = (
        torch.autograd.grad(kernels.alpha_sigmoid(point, alpha, impl=impl).sum(), point)[0]
        for impl, point in (("triton", x.clone().requires_grad_()), ("torch", x.double().requires_grad_()))
    )
    assert ((found - wanted).abs() <= 2e-5 * wanted.abs().clamp(min=1.0)).all()


@pytest.mark.parametrize("alpha", [1.0, 1.5, 3.0, 8.0])
def test_not_a_number_stays_so(alpha):
    """Every family's code; NaN compares false, which read as a gate that keeps."""
    gate = kernels.alpha_sigmoid(torch.tensor([torch.nan, 0.0], device=DEVICE), alpha, impl="triton")
    assert gate.isnan().tolist() == [True, False]


def test_shapes_and_dtypes_come_back():
    x = torch.randn(3, 0, 5, device=DEVICE)
    assert kernels.alpha_sigmoid(x, 1.5, impl="triton").shape == x.shape
    x = torch.randn(3, 700, device=DEVICE).t().bfloat16()
    gate = kernels.alpha_sigmoid(x, 1.5, impl="triton")
    assert gate.dtype == torch.bfloat16
    assert torch.equal(gate, kernels.alpha_sigmoid(x.float(), 1.5, impl="triton").bfloat16())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gates())
def test_drop_times_by_definition(inputs):
    moved = {name: (t.float() if t.is_floating_point() else t).to(DEVICE) for name, t in inputs.items()}
    assert kernels.drop_times(**moved, impl="triton").tolist() == by_definition(**inputs)


@pytest.mark.parametrize(
    ("split_rows", "tile", "beta"),
    [(16, (16, 16), -1.0), (32, (16, 32), -1.0), (160, (16, 16), 0.5), (16, (16, 32), 0.5), (32, (16, 16), 3.0)]
    + [(160, (16, 32), 3.0)],
)
def test_tiles_and_splits_of_the_rows_change_no_drop_time(tile, split_rows, beta, n=150):
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randint(-2, 3, (2, n, 4), generator=generator).float().to(DEVICE) for _ in range(2))
    offset = torch.tensor(beta, device=DEVICE)
    guard = (torch.arange(n) + 1 + torch.randint(0, 9, (2, n), generator=generator)).to(DEVICE)
    end = torch.where(torch.arange(n) < 70, 70, n).expand(2, n).to(DEVICE)
    wanted = kernels.drop_times(query, key, offset, guard=guard, end=end, impl="reference")
    found = times_path.drop_times(query, key, offset, guard, end, tile=tile, split_rows=split_rows)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("end_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("guard_type", [torch.int32, torch.int64])
def test_drop_times_of_integers_of_any_size_leave_their_arguments_alone(guard_type, end_type, n=20):
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randint(-2, 3, (2, n, 4), generator=generator).float().to(DEVICE) for _ in range(2))
    guard = (torch.arange(n, device=DEVICE) + 2).expand(2, n).to(guard_type)
    end = torch.full((2, n), n, dtype=end_type, device=DEVICE)
    beta = query.new_tensor(0.5)
    found = times_path.drop_times(query, key, beta, guard, end)
    assert (found < n).any() and found.dtype == end_type
    assert found.tolist() == kernels.drop_times(query, key, beta, guard=guard, end=end, impl="reference").tolist()
    assert (end == n).all() and (guard[0] == torch.arange(n, device=DEVICE) + 2).all()


def test_a_device_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr("ctxprune.kernels.sigmoid.triton_path.interpreted", lambda: False)
    with pytest.raises(ValueError, match="CUDA"):
        kernels.alpha_sigmoid(torch.zeros(3), 1.5, impl="triton")


def test_float64_is_refused():
    with pytest.raises(ValueError, match="float64"):
        kernels.alpha_sigmoid(torch.zeros(3, device=DEVICE, dtype=torch.float64), 1.5, impl="triton")
    wide = torch.zeros(1, 3, 4, device=DEVICE, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64"):
        kernels.drop_times(wide, wide, wide.new_zeros(()), impl="triton")
