"""Is the alpha-sigmoid exact: its sets of 0 and 1, its symmetry, its values at every alpha, and its derivative?"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

from ctxprune import kernels
from ctxprune.kernels.sigmoid.torch_path import LOG_ZERO, log_alpha_sigmoid

ALPHAS = [1.0, 1.0001, 1.001, 1.1, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 8.0, 12.0, 16.0]
SPARSE = [alpha for alpha in ALPHAS if alpha > 1.0]
LARGEST_ERROR = {torch.float32: 2e-7, torch.float64: 1e-13}


def edge(alpha: float) -> float:
    """Where the gate saturates; for the logistic, where there is nothing left to see in double precision."""
    return 1.0 / (alpha - 1.0) if alpha > 1.02 else 50.0


def grid(alpha: float) -> Tensor:
    """Even points over the band and a little beyond, and points crowding to both edges and to zero (float64)."""
    near = torch.logspace(-12, -1, 100, dtype=torch.float64)
    limit = edge(alpha)
    points = [torch.linspace(-1.05 * limit, 1.05 * limit, 2001, dtype=torch.float64), limit * (1 - near), near]
    points += [-limit * (1 - near), -near, torch.zeros(1, dtype=torch.float64)]
    return torch.cat(points)


@pytest.mark.parametrize("dtype", LARGEST_ERROR)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_error_against_the_reference_is_at_rounding_level(alpha, dtype):
    x = grid(alpha).to(dtype)
    exact = kernels.alpha_sigmoid(x, alpha, impl="reference")
    fast = kernels.alpha_sigmoid(x, alpha)
    assert fast.dtype == dtype and exact.dtype == torch.float64
    assert (fast - exact).abs().max().item() <= LARGEST_ERROR[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_the_result(dtype):
    x = grid(1.5).to(dtype).requires_grad_()
    gate = kernels.alpha_sigmoid(x, 1.5)
    assert gate.dtype == dtype and torch.autograd.grad(gate.sum(), x)[0].dtype == dtype
    assert torch.equal(gate, kernels.alpha_sigmoid(x.detach().float(), 1.5).to(dtype))


@pytest.mark.parametrize("alpha", [1.1, 1.37, 1.9, 2.2, 3.3, 6.0, 8.0, 15.5])
def test_reference_and_fast_path_solve_the_defining_equation_in_40_digits(alpha):
    generator = torch.Generator().manual_seed(int(alpha * 100))
    x = (2 * torch.rand(6, generator=generator, dtype=torch.float64) - 1) * edge(alpha)
    with mpmath.workdps(40):
        e = mpmath.mpf(alpha) - 1
        roots = []
        for value in x.tolist():
            low, high = mpmath.mpf(0), mpmath.mpf(1)
            for _ in range(110):
                p = (low + high) / 2
                low, high = (p, high) if p**e - (1 - p) ** e < e * mpmath.mpf(value) else (low, p)
            roots.append(float(low))
    for impl in ("reference", "torch"):
        exact = torch.tensor(roots, dtype=torch.float64)
        assert (kernels.alpha_sigmoid(x, alpha, impl=impl) - exact).abs().max() < 1e-13


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_closed_forms(impl):
    x = torch.linspace(-4, 4, 801, dtype=torch.float64)
    closed = {
        1.0: 1 / (1 + torch.exp(-x)),
        1.5: torch.where(x.abs() < 2, 0.5 + x / 8 * torch.sqrt((8 - x * x).clamp(min=0)), (x > 0).double()),
        2.0: ((1 + x) / 2).clamp(0, 1),
        3.0: (0.5 + x).clamp(0, 1),
    }
    for alpha, wanted in closed.items():
        assert (kernels.alpha_sigmoid(x, alpha, impl=impl) - wanted).abs().max() < 1e-13, alpha


@pytest.mark.parametrize("dtype", LARGEST_ERROR)
@pytest.mark.parametrize("alpha", SPARSE)
def test_exactly_zero_and_one_from_the_edge_on(alpha, dtype):
    step = torch.finfo(dtype).eps
    outside = torch.tensor([1 + 2 * step, 1.01, 1e4, math.inf], dtype=dtype) / (alpha - 1.0)
    assert torch.equal(kernels.alpha_sigmoid(outside, alpha), torch.ones_like(outside))
    assert torch.equal(kernels.alpha_sigmoid(-outside, alpha), torch.zeros_like(outside))
    log_gate, slope = log_alpha_sigmoid(torch.cat([-outside, outside]), alpha)
    assert log_gate.tolist() == [pytest.approx(LOG_ZERO)] * 4 + [0.0] * 4
    assert not slope.any()


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("dtype", LARGEST_ERROR)
@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 5.0])
def test_zero_at_the_edge_and_not_one_ulp_inside(alpha, dtype, impl):
    at = torch.tensor(1.0 / (alpha - 1.0), dtype=dtype)  # these edges are powers of two: no rounding
    inside = torch.nextafter(at, torch.zeros_like(at))
    assert kernels.alpha_sigmoid(-at, alpha, impl=impl) == 0 and kernels.alpha_sigmoid(at, alpha, impl=impl) == 1
    assert kernels.alpha_sigmoid(-inside, alpha, impl=impl) > 0
    assert log_alpha_sigmoid(inside[None], alpha)[0] <= 0 < log_alpha_sigmoid(inside[None], alpha)[1]


@pytest.mark.parametrize("dtype", LARGEST_ERROR)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_symmetric_monotone_and_never_nan(alpha, dtype):
    odd = torch.tensor([0.0, -0.0, 1e-40, 1e4, math.inf], dtype=dtype)
    x = torch.cat([grid(alpha).to(dtype), odd, -odd]).sort().values
    p, rounding = kernels.alpha_sigmoid(x, alpha), 2 * torch.finfo(dtype).eps
    assert ((p >= 0) & (p <= 1)).all()  # False for NaN
    assert (p + kernels.alpha_sigmoid(-x, alpha) - 1).abs().max() <= rounding
    assert p.diff().min() >= -rounding
    log_gate, slope = log_alpha_sigmoid(x, alpha)
    assert torch.isfinite(slope).all() and (slope >= 0).all() and not log_gate.isnan().any()
    assert kernels.alpha_sigmoid(torch.zeros(1, dtype=dtype), alpha).item() == pytest.approx(0.5, abs=rounding)


@pytest.mark.parametrize("alpha", [1.0, 1.001, 1.1, 1.5, 2.0, 2.5, 3.0, 4.0, 8.0, 12.0])
def test_the_derivative_is_that_of_the_values(alpha):
    inside = torch.linspace(-0.97, 0.97, 21, dtype=torch.float64) * min(edge(alpha), 20.0)
    outside = torch.tensor([-1.5, 1.5], dtype=torch.float64) * edge(alpha)
    x = torch.cat([inside, outside]).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: kernels.alpha_sigmoid(t, alpha), (x,), eps=1e-7, atol=1e-6, rtol=1e-5)
    p = kernels.alpha_sigmoid(x, alpha)
    p.sum().backward()
    if alpha > 1.02:
        assert x.grad[-2:].tolist() == [0.0, 0.0]
    p = p.detach()[:21]
    assert torch.allclose(x.grad[:21], 1 / (p ** (alpha - 2) + (1 - p) ** (alpha - 2)), rtol=1e-10)


@pytest.mark.parametrize("alpha", [0.999, 16.5, math.nan, math.inf])
def test_an_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha is"):
        kernels.alpha_sigmoid(torch.zeros(1), alpha)


def test_an_unknown_implementation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="auto, reference, torch"):
        kernels.alpha_sigmoid(torch.zeros(1), 2.0, impl="fast")


def test_every_operation_has_a_reference_beside_the_fast_path(capsys):
    import runpy

    rows = kernels.describe()
    operations = {row["operation"] for row in rows}
    assert operations == set(kernels.IMPLEMENTATIONS)
    assert {(row["operation"], row["implementation"]) for row in rows} >= {(op, "reference") for op in operations}
    runpy.run_module("ctxprune.kernels", run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows) and all(line.startswith("yes") for line in printed)
