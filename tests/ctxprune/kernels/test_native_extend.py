"""Does the CPU's kernel for several tokens at once do what the torch path does, and is it never missed?"""

from __future__ import annotations

import pytest
import torch

from ctxprune import kernels
from ctxprune.kernels import agreement, checks
from ctxprune.kernels.decode import native_path
from ctxprune.kernels.decode.pages import NEVER
from tests.ctxprune.kernels.test_agreement import recorded, wrong
from tests.ctxprune.kernels.test_decode_attention import ABSENT, largest_error, pool, problem
from tests.ctxprune.kernels.test_native_decode import fields

pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"native: {ABSENT}")


@pytest.fixture(autouse=True)
def asked_anew():
    agreement._asked.cache_clear()
    yield
    agreement._asked.cache_clear()


def extended(tensors, pages, impl: str, part: slice, step: torch.Tensor | None = None, **more) -> torch.Tensor:
    """The tokens of `part` join what the pages hold; step: their positions, by default the part's own."""
    query, key, value, iq, ik, beta = tensors
    column = torch.arange(query.shape[2])[part].expand(len(query), -1)
    tokens = [t[:, :, part] for t in (query, key, value)]
    gates = [iq[:, part], ik[:, part], beta]
    return kernels.extend_attention(
        *tokens, *gates, column if step is None else step, pages, scale=0.3, impl=impl, **more
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("page", "width", "rank", "heads"),
    [(16, 8, 4, (4, 2)), (32, 64, 7, (6, 2)), (16, 84, 1, (3, 1)), (64, 5, 3, (2, 2))],
)
def test_every_field_is_left_as_the_torch_path_leaves_it(page, width, rank, heads, dtype, n=330):
    """Widths in whole vectors and not, queries in one vector and in several, several chunks of a row."""
    tensors = problem(heads=heads[0], kv_heads=heads[1], n=n, width=width, rank=rank, dtype=dtype)
    column = torch.arange(n)
    guard, times = (column + 9).expand(2, n), (column + 1 + (13 * column) % 261).expand(2, n)
    one, other = (pool(tensors, page=page, most=-(-n // page)) for _ in range(2))
    for part in (slice(0, 290), slice(290, 295), slice(295, 330)):
        more = {"guard": guard[:, part], "drop_time": times[:, part]}
        plain, found = (
            extended(tensors, pages, impl, part, **more) for pages, impl in ((one, "torch"), (other, "native"))
        )
        assert found.dtype == dtype and largest_error(found, plain.double()) <= (
            1e-12 if dtype == torch.float64 else 2e-5
        )
        assert all(torch.equal(*pair) for pair in zip(fields(one), fields(other), strict=True))
    assert one.drop_time.unique().numel() > 5, "something was dropped"


def test_padding_is_silent_and_rows_are_as_long_as_they_are(n=60):
    tensors = problem(rows=3, n=n, dtype=torch.float32)
    one, other = (pool(tensors, page=16, most=4) for _ in range(2))
    step = torch.arange(50).repeat(3, 1)
    step[0, :20], step[1, 30:] = -1, -1
    step[0, 20:] = torch.arange(30)
    step[2] = -1  # a row of which nothing comes, and nothing is there
    later = torch.tensor([[-1, 30, 31, 32], [30, -1, -1, -1], [-1, -1, 0, 1]])
    for part, now in ((slice(0, 50), step), (slice(50, 54), later)):
        plain, found = (
            extended(tensors, pages, impl, part, now) for pages, impl in ((one, "torch"), (other, "native"))
        )
        real = (now >= 0)[:, None, :, None].expand_as(found)
        assert (found[~real] == 0).all() and largest_error(found[real], plain[real].double()) <= 2e-5
        assert all(torch.equal(*pair) for pair in zip(fields(one), fields(other), strict=True))


def test_neither_threads_nor_other_rows_nor_other_queries_change_a_bit(n=600):
    tensors = problem(rows=3, n=n, width=64, dtype=torch.float32)
    tensors[5] += 100  # nothing drops

    def run(threads: int, rows: slice, count: int) -> torch.Tensor:
        mine = [t if t.ndim == 0 else t[rows] for t in tensors]
        pages = pool(mine, page=64, most=10)
        torch.set_num_threads(threads)
        extended(mine, pages, "native", slice(0, n - 9))
        return extended(mine, pages, "native", slice(n - 9, n - 9 + count))

    before = torch.get_num_threads()
    try:
        wanted = run(1, slice(0, 3), 9)
        assert torch.equal(run(4, slice(0, 3), 9), wanted) and torch.equal(run(3, slice(1, 2), 9), wanted[1:2])
        for count in (1, 3, 8):
            assert torch.equal(run(2, slice(0, 3), count), wanted[:, :, :count])
    finally:
        torch.set_num_threads(before)


def poisoned(impl: str, dropped: bool) -> torch.Tensor:
    """Outputs of later tokens when all that is dead (dropped) or one key that lives holds NaN."""
    tensors, column = problem(dtype=torch.float32), torch.arange(24)
    tensors[5] += 100  # gates drop nothing
    pages = pool(tensors)
    times = torch.where(column < 10, 19, NEVER).expand(2, 24)
    extended(tensors, pages, impl, slice(0, 20), drop_time=times[:, :20])
    dead = (pages.drop_time <= 19) & (pages.position >= 0)
    page, place = (dead if dropped else pages.drop_time > 19).nonzero(as_tuple=True)
    assert len(page) >= 4
    pages.keys[page, :, place], pages.values[page, :, place] = torch.nan, torch.nan
    pages.interaction[page, place] = torch.nan
    return extended(tensors, pages, impl, slice(20, 24))


def test_dead_slots_are_never_read():
    assert poisoned("native", dropped=True).isfinite().all()


def test_twin_slots_that_are_read_and_a_path_that_reads_all_are_noticed():
    assert not poisoned("native", dropped=False).isfinite().all()
    assert not poisoned("torch", dropped=True).isfinite().all()


def test_auto_takes_it_once_it_has_agreed(monkeypatch):
    native, plain = (recorded(monkeypatch, "extend_attention", impl) for impl in ("native", "torch"))
    tensors = problem(n=5, dtype=torch.float32)
    extended(tensors, pool(tensors), "auto", slice(0, 5))
    assert native[-1] == (2, 4, 5, 8) and (2, 4, 5, 8) not in plain


def test_what_is_wrong_is_not_used_and_said_once(monkeypatch, caplog):
    native = recorded(monkeypatch, "extend_attention", "native", wrong)
    tensors = problem(n=5, dtype=torch.float32)
    for _ in range(2):
        extended(tensors, pool(tensors), "auto", slice(0, 5))
    assert (2, 4, 5, 8) not in native
    (record,) = caplog.records
    assert "extend_attention: torch is used on cpu, not the CPU kernel (result 0 is off by" in record.getMessage()


def test_what_it_does_not_take_goes_to_torch_with_nothing_stored(monkeypatch):
    plain = recorded(monkeypatch, "extend_attention", "torch")
    half, mixed = problem(n=5, dtype=torch.bfloat16), problem(n=5)
    mixed[0] = mixed[0].float()
    grown = problem(n=5, dtype=torch.float32)
    grown[0].requires_grad_()
    many = problem(n=40, dtype=torch.float32)
    monkeypatch.setattr(native_path, "MOST", 30)
    for tensors, reason in ((half, "throughout"), (mixed, "throughout"), (grown, "no gradients"), (many, "up to 30")):
        pages, part = pool(tensors, most=3), slice(0, tensors[0].shape[2])
        with pytest.raises(checks.Refused, match=reason):
            extended(tensors, pages, "native", part)
        assert (pages.position < 0).all() and (pages.used == 0).all()
        extended(tensors, pages, "auto", part)
        assert (pages.used == part.stop).all() and plain[-1] == tuple(tensors[0].shape)


def test_a_table_that_names_no_page_is_an_error():
    tensors = problem(n=24)
    pages = pool(tensors)
    extended(tensors, pages, "native", slice(0, 20))
    pages.table[0, 0] = 99  # the new tokens go to the second page
    with pytest.raises(IndexError, match="no such page, 99"):
        extended(tensors, pages, "native", slice(20, 24))
