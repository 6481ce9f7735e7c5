"""Do several tokens at once join their rows as that many steps, and do pages serve rows in any order?"""

from __future__ import annotations

import pytest
import torch

from ctxprune import kernels
from ctxprune.kernels.decode.pages import order_of
from tests.ctxprune.kernels.test_decode_attention import ABSENT, DEVICE, decoded, largest_error, pool, problem


@pytest.mark.parametrize("chunks", [[24], [1, 23], [7, 1, 9, 7], [70, 10]])
@pytest.mark.parametrize("gated", [True, False])
def test_several_tokens_at_once_are_that_many_steps(chunks, gated):
    n = sum(chunks)
    tensors = problem(n=n)
    column = torch.arange(n, device=DEVICE)
    guard, times = (column + 3).expand(2, n), (column + 1 + (7 * column) % 29).expand(2, n)
    wanted, _ = decoded(
        tensors, pool(tensors, most=6, gated=gated), "reference", guard=guard, drop_time=times, gated=gated
    )
    for impl in ("reference", "torch", *(() if ABSENT else ("native",))):
        pages, outputs, first = pool(tensors, most=6, gated=gated), [], 0
        for length in chunks:
            part = slice(first, first + length)
            query, key, value = (t[:, :, part] for t in tensors[:3])
            gates = (tensors[3][:, part], tensors[4][:, part], tensors[5]) if gated else (None, None, None)
            more = {"guard": guard[:, part], "drop_time": times[:, part]}
            step = column[part].expand(2, length)
            outputs.append(
                kernels.extend_attention(query, key, value, *gates, step, pages, scale=0.3, impl=impl, **more)
            )
            first += length
        assert largest_error(torch.cat(outputs, 2), wanted) <= 1e-12
        assert pages.used.tolist() == [n, n]


def test_padding_at_either_side_is_not_stored_and_says_nothing():
    tensors = problem(rows=2, n=12)
    query, key, value, iq, ik, beta = tensors
    step = torch.tensor([[-1, -1, -1, *range(9)], [*range(12)]], device=DEVICE)
    step[1, 10:] = -1
    pages = pool(tensors)
    found = kernels.extend_attention(query, key, value, iq, ik, beta, step, pages, scale=0.3)
    assert pages.used.tolist() == [9, 10] and (pages.position >= 0).sum() == 19
    assert found[0, :, :3].abs().max() == 0 and found[1, :, 10:].abs().max() == 0
    for row, part in ((0, slice(3, 12)), (1, slice(0, 10))):
        one = [t[row : row + 1, :, part] for t in (query, key, value)] + [t[row : row + 1, part] for t in (iq, ik)]
        wanted, _ = decoded([*one, beta], pool([*one, beta]), "reference")
        assert largest_error(found[row, :, part], wanted[0]) <= 1e-12


def test_tokens_without_room_are_refused_before_anything_is_stored():
    tensors = problem(rows=2, n=40)
    pages, step = pool(tensors, most=2), torch.arange(40).expand(2, 40)
    with pytest.raises(ValueError, match="no room for its tokens"):
        kernels.extend_attention(*tensors, step, pages)
    pages.table[1, 1] = -1
    short = [t[:, :, :20] for t in tensors[:3]] + [t[:, :20] for t in tensors[3:5]]
    with pytest.raises(ValueError, match="no room for its tokens"):
        kernels.extend_attention(*short, tensors[5], step[:, :20], pages)
    assert pages.used.tolist() == [0, 0] and (pages.position < 0).all()
    with pytest.raises(ValueError, match="step has shape"):
        kernels.extend_attention(*short, tensors[5], step, pages)


@pytest.mark.parametrize("scattered", [False, True])
def test_the_order_of_pages_may_be_kept(scattered):
    """Pages that are the first of the pool are read in place, others gathered; known beforehand or found each time."""
    tensors = problem(n=20, dtype=torch.float32)
    known, found = pool(tensors), pool(tensors)
    for pages in (known, found):
        pages.table.copy_(torch.tensor([[4, 0], [2, 3]] if scattered else [[3, 0], [2, 1]]))
    known.order = order_of(known.table)
    assert isinstance(known.order.pages, slice) != scattered
    assert torch.equal(decoded(tensors, known, "torch")[0], decoded(tensors, found, "torch")[0])


def test_cleared_pages_serve_another_row():
    tensors = problem(rows=1, n=14)
    tensors[5] += 100  # nothing drops
    pages = pool(tensors)
    decoded(tensors, pages, "torch")
    pages.used.zero_()
    pages.free.fill_(-1)
    stale, _ = decoded(tensors, pages, "torch", steps=1)
    pages.clear(pages.table[0].long())
    pages.used.zero_()
    pages.free.fill_(-1)
    clean, _ = decoded(tensors, pages, "torch", steps=1)
    torch.testing.assert_close(clean[0, :, 0], tensors[2][0, :, 0].repeat_interleave(2, 0), rtol=0, atol=0)
    assert not torch.equal(stale, clean)
