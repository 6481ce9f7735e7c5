"""Are the slots that a CPU looks up for the next tokens those that a search finds, in its order?"""

from __future__ import annotations

import pytest
import torch

from ctxprune.cache.layer_cache import AHEAD, LayerCache
from ctxprune.kernels.decode import native_path
from tests.ctxprune.kernels.test_decode_attention import ABSENT

pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"native: {ABSENT}")
STEP = 40


def cache_of(dropped: float, page: int = 16, rows: int = 5) -> LayerCache:
    """Rows of 0 to 90 tokens in pages that come in no order, of which that share is dropped before STEP, at it, or
    later."""
    torch.manual_seed(page)
    cache = LayerCache(rows, kv_heads=1, width=4, rank=None, page=page)
    used = torch.randint(0, 90, (rows,)) * (torch.arange(rows) > 0)
    for _ in range(3):
        cache.give((used > cache.given() * page).long() * 2)
        cache.give((used > cache.given() * page).long())
    pages = cache.pages
    pages.used.copy_(used)
    times = torch.where(torch.rand(pages.drop_time.shape) < dropped, STEP + torch.randint(-1, 2, (1,)), 2**31 - 1)
    pages.drop_time.copy_(torch.where(times < 2**31 - 1, times + torch.randint(-1, 2, times.shape), times))
    return cache


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("dropped", [0.0, 0.1, 0.8, 1.0])
@pytest.mark.parametrize("strided", [False, True])
def test_they_are_those_that_a_search_finds(dropped, page, strided):
    cache = cache_of(dropped, page)
    step = torch.full((5, 2), STEP, dtype=torch.int64)[:, 0] if strided else torch.full((5,), STEP, dtype=torch.int32)
    slots, counts = native_path.takeable_slots(cache.pages, step, AHEAD)
    wanted, wanted_counts = cache._searched(step)
    assert counts.tolist() == wanted_counts.tolist() and counts.max() > 0
    assert slots.shape == (5, AHEAD)
    for row, count in enumerate(counts.tolist()):
        assert slots[row, :count].tolist() == wanted[row, : min(count, AHEAD)].tolist()


def test_twin_a_key_that_dies_at_the_step_itself_is_not_free_yet():
    cache = cache_of(0.0)
    step = torch.full((5,), STEP, dtype=torch.int32)
    before = native_path.takeable_slots(cache.pages, step, AHEAD)[1]
    for time, more in ((STEP, 0), (STEP - 1, 1)):
        cache.pages.drop_time[cache.pages.table[4, 0], 3] = time
        assert native_path.takeable_slots(cache.pages, step, AHEAD)[1][4] == before[4] + more


def test_a_table_that_names_no_page_is_an_error():
    cache = cache_of(0.5)
    cache.pages.table[2, 0] = len(cache.pages.keys)
    with pytest.raises(IndexError, match="no such page"):
        native_path.takeable_slots(cache.pages, torch.zeros(5, dtype=torch.int32), AHEAD)
    with pytest.raises(RuntimeError, match="one step for each row"):
        native_path.takeable_slots(cache.pages, torch.zeros(4, dtype=torch.int32), AHEAD)


def test_without_a_kernel_a_search_finds_them(monkeypatch):
    cache, step = cache_of(0.5), torch.full((5,), STEP, dtype=torch.int32)
    found = cache._takeable(step)
    monkeypatch.setenv(native_path.SWITCH, "0")
    assert native_path.takeable_slots(cache.pages, step, AHEAD) is None
    slots, counts = cache._takeable(step)
    assert counts.tolist() == found[1].tolist()
    assert all(torch.equal(slots[row, :n], found[0][row, :n]) for row, n in enumerate(counts.clamp(max=AHEAD).tolist()))
