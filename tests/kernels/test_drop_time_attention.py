"""Does attention under drop times see exactly the live keys?"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import kernels
from kernels.hard_attention import torch_path


def inputs(heads: int, kv_heads: int, n: int, dtype=torch.float64, seed: int = 0):
    """query, key, value, and a drop time after each key's own row (one per key)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    times = torch.arange(n) + 1 + torch.randint(0, n + 3, (2, n), generator=generator)
    return normal(2, heads, n, 8), normal(2, kv_heads, n, 8), normal(2, kv_heads, n, 8), times


@pytest.mark.parametrize("block", [16, 1024])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("n", [1, 2, 40])
def test_output_and_gradients_are_the_references(heads, kv_heads, n, block, monkeypatch):
    monkeypatch.setattr(torch_path, "BLOCK", block)
    *tensors, times = inputs(heads, kv_heads, n)
    results = {}
    for impl in ("reference", "torch"):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = kernels.drop_time_attention(*leaves, times, scale=0.3, impl=impl)
        results[impl] = [output, *torch.autograd.grad((output**2).sum(), leaves)]
    for one, other in zip(results["reference"], results["torch"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_each_key_value_head_may_have_its_own_drop_times():
    query, key, value, times = inputs(4, 2, 40)
    per_head = torch.stack([times, times.flip(0)], dim=1)
    output = kernels.drop_time_attention(query, key, value, per_head)
    exact = kernels.drop_time_attention(query, key, value, per_head, impl="reference")
    torch.testing.assert_close(output, exact, rtol=1e-10, atol=1e-12)
    for head, shared in ((0, times), (1, times.flip(0))):
        alone = kernels.drop_time_attention(query, key, value, shared)
        torch.testing.assert_close(output[:, 2 * head : 2 * head + 2], alone[:, 2 * head : 2 * head + 2])


def test_nothing_dropped_is_plain_causal_attention():
    query, key, value, times = inputs(4, 4, 33)
    output = kernels.drop_time_attention(query, key, value, torch.full_like(times, 33))
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value, is_causal=True))


def test_everything_dropped_leaves_a_token_its_own_value():
    query, key, value, times = inputs(4, 4, 33)
    output = kernels.drop_time_attention(query, key, value, (torch.arange(33) + 1).expand_as(times))
    torch.testing.assert_close(output, value)


def test_a_dropped_key_has_no_influence_whatever_it_holds():
    query, key, value, times = inputs(4, 2, 33)
    before = kernels.drop_time_attention(query, key, value, times)
    key, value, dead = key.clone(), value.clone(), int(times[0, 3])
    key[0, :, 3] += 5.0
    value[0, :, 3] = 1e6
    after = kernels.drop_time_attention(query, key, value, times)
    assert 4 < dead < 33
    assert torch.equal(before[0, :, dead:], after[0, :, dead:])
    assert not torch.equal(before[0, :, 3:dead], after[0, :, 3:dead])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_costs_what_the_same_precision_without_drops_costs(dtype):
    query, key, value, times = inputs(4, 2, 33, dtype)
    exact = kernels.drop_time_attention(query, key, value, times, impl="reference")
    output = kernels.drop_time_attention(query, key, value, times)
    assert output.dtype == dtype
    assert (output - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_shapes_that_do_not_fit_are_refused_by_name():
    query, key, value, times = inputs(4, 2, 9)
    with pytest.raises(ValueError, match="drop_time has shape"):
        kernels.drop_time_attention(query, key, value, times[:, :8])
    with pytest.raises(ValueError, match="not a multiple"):
        kernels.drop_time_attention(query[:, :3], key, value, times)
    with pytest.raises(ValueError, match="want 4 axes"):
        kernels.drop_time_attention(query, key, value[:, :, :8], times)
    with pytest.raises(ValueError, match="differ in batch, n or width"):
        kernels.drop_time_attention(query[:, :, :8], key, value, times)
