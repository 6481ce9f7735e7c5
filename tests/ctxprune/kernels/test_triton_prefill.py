"""Does the Triton prefill gather exactly the live keys? On a GPU, else interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from ctxprune import kernels
from ctxprune.kernels.hard_attention import patterns, triton_path
from tests.ctxprune.kernels.test_drop_time_attention import inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moved(tensors, dtype=torch.float32):
    return [tensor.to(DEVICE, dtype if tensor.is_floating_point() else None) for tensor in tensors]


def largest_error(found, exact) -> float:
    """False comparisons for NaN: not a number counts as infinitely wrong."""
    return (found.double() - exact).abs().max().nan_to_num(torch.inf).item()


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 32)])
@pytest.mark.parametrize(("heads", "kv_heads", "n"), [(4, 4, 1), (4, 1, 16), (4, 2, 17), (4, 4, 61), (4, 1, 61)])
def test_output_is_the_references(heads, kv_heads, n, tile):
    tensors = moved(inputs(heads, kv_heads, n))
    exact = kernels.drop_time_attention(*tensors, scale=0.3, impl="reference")
    assert largest_error(triton_path.drop_time_attention(*tensors, 0.3, tile=tile), exact) <= 2e-6


def test_each_key_value_head_may_have_its_own_drop_times():
    query, key, value, times = moved(inputs(4, 2, 40))
    per_head = torch.stack([times, times.flip(0)], dim=1)
    exact = kernels.drop_time_attention(query, key, value, per_head, impl="reference")
    assert largest_error(triton_path.drop_time_attention(query, key, value, per_head, 8**-0.5), exact) <= 2e-6


@pytest.mark.parametrize("width", [5, 8, 16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_at_most_twice_the_plain_forms(dtype, width):
    generator = torch.Generator().manual_seed(1)
    *_, times = moved(inputs(4, 2, 50))
    query, key, value = (torch.randn(2, heads, 50, width, generator=generator).to(DEVICE, dtype) for heads in (4, 2, 2))
    exact = kernels.drop_time_attention(query, key, value, times, impl="reference")
    found = kernels.drop_time_attention(query, key, value, times, impl="triton")
    assert found.dtype == dtype
    row, column = torch.arange(50, device=DEVICE)[:, None], torch.arange(50, device=DEVICE)
    seen = ((column <= row) & (row < times[:, None, :]))[:, None]
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * width**-0.5
    plain = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1) @ value.repeat_interleave(2, 1)
    allowed = 2 * largest_error(plain, exact) + 2 * torch.finfo(dtype).eps
    assert largest_error(found, exact) <= allowed


@pytest.mark.parametrize("blocks", [1, 2])
def test_lists_made_in_several_passes_change_nothing(blocks):
    tensors = moved(inputs(4, 2, 61))
    whole = triton_path.drop_time_attention(*tensors, 0.3, tile=(16, 16))
    parts = triton_path.drop_time_attention(*tensors, 0.3, tile=(16, 16), lists=4 * 2 * 64 * blocks)
    assert torch.equal(whole, parts)


def test_nothing_dropped_is_plain_causal_attention_and_everything_dropped_is_the_value():
    query, key, value, times = moved(inputs(4, 4, 33))
    column = torch.arange(33, device=DEVICE).expand_as(times)
    found = kernels.drop_time_attention(query, key, value, torch.full_like(times, 99), impl="triton")
    torch.testing.assert_close(found, scaled_dot_product_attention(query, key, value, is_causal=True))
    torch.testing.assert_close(kernels.drop_time_attention(query, key, value, column + 1, impl="triton"), value)


def test_what_no_query_of_a_block_sees_is_not_even_read():
    """Keys that die within their own block hold NaN; queries of later blocks do not notice."""
    query, key, value, times = moved(inputs(4, 2, 64))
    early = torch.arange(64, device=DEVICE) < 16
    times = torch.where(early, torch.arange(64, device=DEVICE) + 1, times)
    wanted = triton_path.drop_time_attention(query, key, value, times, 0.3, tile=(16, 16))
    key, value = (tensor.masked_fill(early[:, None], torch.nan) for tensor in (key, value))
    found = triton_path.drop_time_attention(query, key, value, times, 0.3, tile=(16, 16))
    assert found[:, :, :16].isnan().all() and torch.equal(found[:, :, 16:], wanted[:, :, 16:])


def test_views_of_other_layouts_and_gradients_are_taken():
    query, key, value, times = moved(inputs(4, 2, 20))
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value)]
    wanted = kernels.drop_time_attention(query, key, value, times, impl="triton")
    assert torch.equal(kernels.drop_time_attention(*turned, times, impl="triton"), wanted)
    leaf = query.clone().requires_grad_()
    output = kernels.drop_time_attention(leaf, key, value, times, impl="triton")
    torch.testing.assert_close(output.detach(), wanted)
    assert torch.autograd.grad(output.sum(), leaf)[0].abs().max() > 0


@pytest.mark.parametrize("tile", [(16, 16), (32, 16)])
@pytest.mark.parametrize("pattern", [patterns.strided(61, 16, 7), patterns.blocks(61, 32, sinks=3, scattered=1)])
def test_patterns_hide_what_they_hide(pattern, tile):
    tensors, pattern = moved(inputs(4, 2, 61)), pattern.to(DEVICE)
    exact = kernels.drop_time_attention(*tensors, pattern=pattern, scale=0.3, impl="reference")
    assert largest_error(triton_path.drop_time_attention(*tensors, 0.3, pattern, tile=tile), exact) <= 2e-6


def test_a_pattern_of_odd_blocks_is_refused():
    with pytest.raises(ValueError, match=r"pattern\.block is 20; Triton takes multiples of 16"):
        triton_path.drop_time_attention(*moved(inputs(4, 2, 61)), 0.3, patterns.strided(61, 20, 7).to(DEVICE))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_lists_hold_exactly_what_is_seen(data):
    """Against a brute-force set, over random drop times, blocks and first blocks."""
    n, rows = data.draw(st.integers(1, 70)), data.draw(st.sampled_from([16, 32]))
    times = torch.tensor([data.draw(st.lists(st.integers(0, n), min_size=n, max_size=n))], dtype=torch.int32)
    first = data.draw(st.integers(0, (n - 1) // rows))
    blocks = -(-n // rows) - first
    listed = torch.full((1, blocks, n), -1, dtype=torch.int32, device=DEVICE)
    whole, total = torch.zeros(2, 1, blocks, dtype=torch.int32, device=DEVICE)
    times = times.to(DEVICE)
    triton_path.list_kernel[(blocks, 1)](
        times, times, listed, whole, total, first, n, n, n, ROWS=rows, CHUNK=32, PATTERN=False
    )
    for block in range(blocks):
        queries = range((first + block) * rows, min(n, (first + block + 1) * rows))
        seen = {key: [key <= query < times[0, key] for query in queries] for key in range(n)}
        found = listed[0, block, : total[0, block]].tolist()
        every = {key for key in seen if all(seen[key])}
        some = {key for key in seen if any(seen[key])}
        assert len(found) == len(set(found))
        assert set(found[: whole[0, block]]) == every - set(queries)
        # A key of the block itself is listed when it outlives the block's first query.
        assert some <= set(found) <= some | set(queries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.double(), k, v), "float64"),
        (lambda q, k, v: (q, k, v[..., :4]), "want one width"),
        (lambda q, k, v: [torch.zeros(*t.shape[:3], 130, device=q.device) for t in (q, k, v)], "Triton takes 1 to 128"),
    ],
)
def test_what_triton_cannot_do_is_refused(change, message):
    *tensors, times = moved(inputs(4, 2, 9))
    with pytest.raises(ValueError, match=message):
        kernels.drop_time_attention(*change(*tensors), times, impl="triton")
