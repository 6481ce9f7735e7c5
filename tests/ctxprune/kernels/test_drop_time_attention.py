"""Does attention under drop times see exactly the live keys?"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ctxprune import kernels
from ctxprune.kernels.hard_attention import patterns, torch_path


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


@pytest.mark.parametrize("lifetime", [3, 12])
@pytest.mark.parametrize("per_head", [False, True])
def test_keys_gathered_side_by_side_change_nothing(lifetime, per_head, monkeypatch):
    """Short lives: from the second block of queries on, most keys before it are gone."""
    monkeypatch.setattr(torch_path, "BLOCK", 16)
    gathered, original = [], torch_path._gathered
    monkeypatch.setattr(torch_path, "_gathered", lambda *a: gathered.append(1) or original(*a))
    *tensors, times = inputs(4, 2, 100)
    times = torch.arange(100) + 1 + times % lifetime
    times = torch.stack([times, times.flip(0)], dim=1) if per_head else times
    results = {}
    for impl in ("reference", "torch"):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = kernels.drop_time_attention(*leaves, times, scale=0.3, impl=impl)
        results[impl] = [output, *torch.autograd.grad((output**2).sum(), leaves)]
    assert len(gathered) >= 2 * 5, "keys and values of nearly every block"
    for one, other in zip(results["reference"], results["torch"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


PATTERNS = {
    "strided": patterns.strided(70, 8, 5),
    "one window": patterns.blocks(70, 16, window=2),
    "longformer": patterns.blocks(70, 16, window=1, sinks=3),
    "bigbird": patterns.blocks(70, 8, window=2, sinks=3, scattered=2),
}


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_patterns_hide_what_they_hide(pattern, dropping):
    """The torch path against a mask, and gradients against the reference; alone and together with drop times."""
    query, key, value, times = inputs(4, 2, 70)
    times = times if dropping else torch.full_like(times, 70)
    row, column = torch.arange(70)[:, None], torch.arange(70)
    seen = (column <= row) & (row < times[:, None, None]) & pattern.allowed[torch.arange(70) // pattern.block]
    exact = scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=seen
    )
    results = {}
    for impl in ("reference", "torch"):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        output = kernels.drop_time_attention(*leaves, times, pattern=pattern, impl=impl)
        torch.testing.assert_close(output, exact, rtol=1e-10, atol=1e-12)
        results[impl] = torch.autograd.grad((output**2).sum(), leaves)
    for one, other in zip(results["reference"], results["torch"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_patterns_are_what_their_papers_say():
    allowed = PATTERNS["strided"].allowed
    assert allowed[3].nonzero().view(-1).tolist() == [4, 9, 14, 19, *range(24, 32), *range(34, 70, 5)]
    allowed = PATTERNS["longformer"].allowed
    assert allowed[2].nonzero().view(-1).tolist() == [0, 1, 2, *range(32, 48)]
    allowed, plain = PATTERNS["bigbird"].allowed, patterns.blocks(70, 8, window=2, sinks=3).allowed
    for row in range(len(allowed)):
        drawn = (allowed[row] & ~plain[row]).nonzero().view(-1) // 8
        assert len(set(drawn.tolist()) - {0}) <= 2 and all(block < row - 1 for block in drawn)
    assert (allowed[-1] & ~plain[-1]).sum() > 0


def test_a_key_comes_back_under_a_pattern():
    """What no drop time can say: hidden from one block of queries, seen by the next."""
    hidden = torch.ones(3, 48, dtype=torch.bool)
    hidden[1, 5] = False
    query, key, value, times = inputs(4, 2, 48)
    times = torch.full_like(times, 48)
    before = kernels.drop_time_attention(query, key, value, times, pattern=patterns.Pattern(hidden, 16))
    value = value.clone()
    value[:, :, 5] += 1.0
    after = kernels.drop_time_attention(query, key, value, times, pattern=patterns.Pattern(hidden, 16))
    same = (before == after).all(-1).all(0).all(0)
    assert same[16:32].all() and not same[5:16].any() and not same[32:].any()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (patterns.Pattern(torch.ones(3, 33, dtype=torch.bool), 16), None),
        (patterns.Pattern(torch.ones(2, 33, dtype=torch.bool), 16), "want \\(blocks of queries, n\\) = \\(3, 33\\)"),
        (patterns.Pattern(torch.ones(3, 33), 16), "torch.bool"),
        (patterns.Pattern(torch.ones(3, 33, dtype=torch.bool), 0), "pattern.block is 0"),
        (patterns.Pattern(torch.ones(3, 33, dtype=torch.bool).triu(20), 16), "hides token"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(pattern, message):
    tensors = inputs(4, 2, 33)
    if message is None:
        kernels.drop_time_attention(*tensors, pattern=pattern)
        return
    with pytest.raises(ValueError, match=message):
        kernels.drop_time_attention(*tensors, pattern=pattern)


@pytest.mark.parametrize("name", ["n", "block", "stride", "window"])
def test_sizes_of_patterns_are_named_when_refused(name):
    sizes = {"n": 9, "block": 3, "stride": 2, "window": 1}
    with pytest.raises(ValueError, match=f"{name} is 0; accepted values are 1 and more"):
        patterns.strided(**{**sizes, name: 0})
    with pytest.raises(ValueError, match="sinks is -1; accepted values are 0 and more"):
        patterns.blocks(9, 3, sinks=-1)


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


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_the_last_query_does_not_mind_in_which_order_its_keys_lie(impl):
    query, key, value, times = inputs(4, 2, 40)
    order = torch.cat([torch.randperm(39, generator=torch.Generator().manual_seed(1)), torch.tensor([39])])
    token = torch.arange(40)
    # Who lives to the end does wherever it lies; who does not is gone before.
    moved = torch.where(times[:, order] >= 40, times[:, order], token + 1)
    one = kernels.drop_time_attention(query, key, value, times, impl=impl)
    other = kernels.drop_time_attention(query, key[:, :, order], value[:, :, order], moved, impl=impl)
    torch.testing.assert_close(other[:, :, -1], one[:, :, -1], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(other[:, :, 20], one[:, :, 20])


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
