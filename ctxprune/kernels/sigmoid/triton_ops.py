"""How does a Triton kernel solve the alpha-sigmoid? The Newton steps of torch_path.py, in log2 and in registers."""

from __future__ import annotations

import triton
import triton.language as tl

NEWTON_STEPS = 2
"""Steps that give float32 accuracy up to alpha = 5 (ctxprune/kernels/sigmoid/torch_path.py)."""

STEEP_NEWTON_STEPS = 3
"""Steps above alpha = 5."""

LOGISTIC_BELOW = 1e-7
"""alpha - 1 below which the gate is the logistic: they differ by less than float32 can say."""


def family(alpha: float) -> dict[str, object]:
    """Which code solves this alpha: compile-time constants FLAT (alpha < 2) and STEPS (0: the logistic).

    alpha itself stays a run-time number: a schedule from 1 to 16 compiles four variants in all.
    """
    e = alpha - 1.0
    if e < LOGISTIC_BELOW:
        return {"FLAT": True, "STEPS": 0}
    return {"FLAT": e < 1.0, "STEPS": NEWTON_STEPS if e <= 4.0 else STEEP_NEWTON_STEPS}


@triton.jit
def log2(x, PTX: tl.constexpr):
    """log2 of a positive float32; PTX: the hardware instruction, where tl.log2 is a routine of some 20 instructions."""
    if PTX:
        result = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.log2(x)
    return result


@triton.jit
def log2_of_one_plus(z):
    """log2(1 + z) for -1/2 <= z <= 1 to a few units in the last place of the result, however small z is."""
    # 2 artanh(w), w = z / (2 + z) within +-1/3: the hardware logarithm is only exact to 2^-22 absolutely.
    w = z / (z + 2.0)
    square = w * w
    series = 0.07692307692 + square * 0.06666666667
    series = 0.09090909091 + square * series
    series = 0.11111111111 + square * series
    series = 0.14285714286 + square * series
    series = 0.2 + square * series
    series = 0.33333333333 + square * series
    return 2.8853900818 * w * (1.0 + square * series)


@triton.jit
def exp_minus_one(z, exponential):
    """exp(z) - 1 for z <= 0, given exp(z): the Taylor series near 0, where the difference would cancel."""
    series = 1.9841269841e-4 + z * 2.4801587302e-5
    series = 1.3888888889e-3 + z * series
    series = 8.3333333333e-3 + z * series
    series = 4.1666666667e-2 + z * series
    series = 0.16666666667 + z * series
    series = 0.5 + z * series
    return tl.where(z > -0.5, z * (1.0 + z * series), exponential - 1.0)


@triton.jit
def _newton_start(y, e, FLAT: tl.constexpr, PTX: tl.constexpr):
    """log2 p of the smaller side where Newton starts: the exact solution of the term that dominates."""
    log_u = tl.where(y < 0.5, log2_of_one_plus(-tl.minimum(y, 0.5)), log2(1.0 - y, PTX))
    start = log_u / e
    if FLAT:
        start -= log2_of_one_plus(tl.exp2(tl.maximum(start - log_u, -126.0)))
    else:
        root = tl.exp2(log2(tl.maximum(y, 1e-30), PTX) / e)
        start = tl.minimum(start, log2(tl.maximum(1.0 - root, (1.0 - y) / e), PTX))
    return tl.minimum(start, -1.0)


@triton.jit
def _newton_step(s, y, e, FLAT: tl.constexpr):
    """One step on ln(p^e + 1 - (1 - p)^e) = ln(1 - y) in s = log2 p."""
    u = 1.0 - y
    p = tl.exp2(s)
    rest = log2_of_one_plus(-p)
    power, rest_power = tl.exp2(e * s), tl.exp2(e * rest)
    rest_less_one = exp_minus_one(e * rest * 0.6931471806, rest_power)
    found = power - rest_less_one
    # found - u in two forms, each where it cancels nothing: gate near saturation, gate near 1/2.
    if FLAT:
        near_half = (exp_minus_one(e * s * 0.6931471806, power) - rest_less_one) + y
    else:
        near_half = (power - rest_power) + y
    excess = tl.where(found < 0.5, found - u, near_half) / u
    slope = e * (power + p * rest_power / (1.0 - p))
    # The start is within a factor of two of the solution: the clamp is for what rounding might do.
    ratio = log2_of_one_plus(tl.minimum(tl.maximum(excess, -0.5), 1.0))
    return tl.minimum(s - ratio * found / slope, -1.0)


@triton.jit
def _logistic(x):
    """log2 sigma(x) and d ln sigma / dx of the logistic."""
    small = tl.exp2(tl.maximum(-tl.abs(x) * 1.4426950409, -126.0))
    log_gate = tl.minimum(x, 0.0) * 1.4426950409 - log2_of_one_plus(small)
    return tl.maximum(log_gate, -1e30), tl.where(x > 0, small, 1.0) / (1.0 + small)


@triton.jit
def _entmax(x, e, FLAT: tl.constexpr, STEPS: tl.constexpr, PTX: tl.constexpr):
    """log2 sigma_alpha(x) and d ln sigma_alpha / dx for e = alpha - 1 > 0."""
    inside = e * tl.abs(x) < 1.0
    y = tl.where(inside, e * tl.abs(x), 0.0)
    negative = x < 0
    s = _newton_start(y, e, FLAT, PTX)
    for _ in tl.static_range(STEPS):
        s = _newton_step(s, y, e, FLAT)
    p = tl.exp2(s)
    rest = log2_of_one_plus(-p)
    # d ln g/dx = 1 / (g (g^(e-1) + (1-g)^(e-1))), in logarithms: no 0/0 at the edges.
    low = tl.exp2(e * s) + p * tl.exp2((e - 1.0) * rest)
    high = tl.exp2(e * rest) + (1.0 - p) * tl.exp2(tl.minimum((e - 1.0) * s, 126.0))
    slope = 1.0 / tl.where(negative, low, high)
    log_gate = tl.where(inside, tl.where(negative, s, rest), tl.where(negative, -1e30, 0.0))
    return log_gate, tl.where(inside, slope, 0.0)


@triton.jit
def log2_gate(x, e, FLAT: tl.constexpr, STEPS: tl.constexpr, PTX: tl.constexpr):
    """log2 g and d ln g/dx of g = sigma_alpha(x), float32, e = alpha - 1 in [0, 15]; FLAT and STEPS from `family`.

    -1e30 stands for log2 0: finite, so that sums of it never give NaN, and exp2 of it is exactly 0. The derivative is
    exactly 0 wherever the gate is 0 or 1.
    """
    if STEPS == 0:
        log_gate, slope = _logistic(x)
    else:
        log_gate, slope = _entmax(x, e, FLAT, STEPS, PTX)
    # NaN compares false with everything, and a minimum passes it by: without this it would read as a gate that keeps.
    return tl.where(x == x, log_gate, x), slope
