"""Do dropped keys come back exactly where a query may need them?"""

from __future__ import annotations

import pytest
import torch

import ctxprune
from ctxprune import Alarm, PrunedCache, UserError, generate
from ctxprune.cache.cold_store import COLD_PAGE, ColdStore, archive
from ctxprune.cache.layer_cache import LayerCache
from ctxprune.cache.revival import attend_again, bounds, live_mass, revive
from ctxprune.kernels.decode.pages import NEVER
from tests.models import LAYERS, gated, small_model, tokens


def texts(made) -> list[list[int]]:
    return [row.tolist() for row in made.tokens]


def prompts_of(*lengths: int) -> list[torch.Tensor]:
    return [tokens(1, n, seed=n)[0] for n in lengths]


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("policy", ["gates", "window"])
def test_an_alarm_that_allows_nothing_makes_the_model_dense(policy, chunk):
    """Every key comes back at every step, in every layer, whoever joins and leaves meanwhile."""
    model = gated() if policy == "gates" else ctxprune.retrofit(small_model(), ctxprune.WindowConfig((3, 5, 9)))
    model, prompts, alarm = model.double(), prompts_of(30, 11, 3, 24), Alarm(share=1e-12)
    how = {"max_new_tokens": 20, "max_batch": 3, "prefill_chunk": chunk}
    free = generate(model, prompts, **how)
    found = generate(model, prompts, alarm=alarm, **how)
    if policy == "window":
        # A prompt is read under the window; what is written afterwards sees everything.
        assert texts(found) != texts(free) and alarm.revived > 0
        return
    with ctxprune.mode(model, "dense"):
        dense = generate(model, [prompt[:1] for prompt in prompts], max_new_tokens=20)
    short = generate(model, [prompt[:1] for prompt in prompts], max_new_tokens=20, alarm=Alarm(share=1e-12))
    assert texts(short) == texts(dense) != texts(generate(model, [prompt[:1] for prompt in prompts], max_new_tokens=20))
    assert alarm.alarms > 0 and alarm.revived >= alarm.alarms


def test_an_alarm_that_allows_everything_changes_nothing():
    model, prompts, alarm = gated().double(), prompts_of(30, 11), Alarm(share=1 - 1e-9)
    assert texts(generate(model, prompts, max_new_tokens=20, alarm=alarm)) == texts(
        generate(model, prompts, max_new_tokens=20)
    )
    assert alarm.revived == alarm.alarms == 0 and alarm.checks == 2 * 19 * LAYERS


def test_the_less_it_allows_the_more_comes_back_and_the_nearer_the_model_is_to_its_dense_self():
    model, ids, error, revived = gated(beta=1.5).double(), tokens(4, 60), [], []
    with torch.no_grad(), ctxprune.mode(model, "dense"):
        dense = model(ids).logits[:, 1:]
    for share in (0.99, 0.6, 0.3, 0.05):
        alarm = Alarm(share=share)
        cache, logits = PrunedCache(alarm=alarm), []
        with torch.no_grad():
            for step in range(60):
                logits.append(model(ids[:, step : step + 1], past_key_values=cache, use_cache=True).logits)
        error.append((torch.cat(logits, 1)[:, 1:] - dense).abs().mean().item())
        revived.append(alarm.revived)
    assert revived == sorted(revived) and revived[0] < revived[-1]
    assert error == sorted(error, reverse=True) and error[-1] < 0.5 * error[0]


def test_nothing_is_lost_on_the_way():
    """At every step each position is in one place: among the living or in the cold."""
    model, ids, alarm = gated().double(), tokens(2, 60), Alarm(share=0.3, grace=4)
    cache = PrunedCache(alarm=alarm, page=16)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache, use_cache=True)
        for step in range(20, 60):
            model(ids[:, step : step + 1], past_key_values=cache, use_cache=True)
            for layer, (hot, cold) in enumerate(zip(cache.held, alarm.cold, strict=True)):
                alive = hot.positions(cache.last)
                waiting = cold.positions(torch.zeros(2))
                for row in range(2):
                    assert sorted(alive[row] + waiting[row]) == list(range(step + 1)), (layer, row)
    assert alarm.revived > 0


def stores(seed: int, dtype=torch.float64, rounded=torch.float64) -> tuple[LayerCache, ColdStore, torch.Tensor]:
    """Two rows of 60 keys, the first 45 of which are dropped; queries of four heads. rounded: what numbers are rounded
    to before they are of the dtype."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(rounded).to(dtype)

    hot = LayerCache(2, kv_heads=2, width=8, rank=None, page=16, dtype=dtype)
    hot.make_room_for(torch.tensor([60, 60]))
    step = torch.arange(60, dtype=torch.int32).expand(2, 60)
    times = torch.where(step < 45, step + 5, NEVER)
    hot.pages.store(normal(2, 2, 60, 8), normal(2, 2, 60, 8), None, step, step + 1, times)
    return hot, ColdStore.beside(hot), normal(2, 4, 8)


def of_row(layer: LayerCache, row: int) -> torch.Tensor:
    """Keys that a row holds, by page: (pages, kv_heads, page, width), NaN where there is none."""
    table = layer.pages.table[row]
    mine = table[table >= 0].long()
    held = (layer.pages.position[mine] >= 0)[:, None, :, None]
    return layer.pages.keys[mine].masked_fill(~held, torch.nan)


@pytest.mark.parametrize("seed", range(5))
def test_sketches_bound_what_is_in_their_pages_from_above(seed):
    hot, cold, query = stores(seed)
    archive(hot, cold, torch.tensor([59, 30], dtype=torch.int32))
    assert cold.pages.live(torch.zeros(2)).tolist() == [45, 26]
    logs, order = bounds(cold, query, 0.3)
    for row in range(2):
        keys = of_row(cold, row).repeat_interleave(2, 1)
        exact = (keys * query[row][None, :, None]).sum(-1).mul(0.3).exp().nansum(-1).log()
        found = logs[order.row == row]
        assert (found >= exact - 1e-12).all() and (found < exact + 8).all()
    assert cold.count[order.pages].sum() == 71 and len(order.row) == -(-45 // COLD_PAGE) + -(-26 // COLD_PAGE)


def test_twin_sketches_that_are_not_renewed_are_caught(monkeypatch):
    original = ColdStore.sketch
    monkeypatch.setattr(ColdStore, "sketch", lambda cold, pages: original(cold, pages[:1]))
    with pytest.raises(AssertionError):
        test_sketches_bound_what_is_in_their_pages_from_above(0)


def test_in_bfloat16_only_what_is_stored_is_rounded():
    """Logits of 50 would be off by an eighth, and a sum of shares would stop at a half."""
    step, found = torch.tensor([59, 59], dtype=torch.int32), []
    for dtype in (torch.bfloat16, torch.float32):
        hot, cold, query = stores(0, dtype, torch.bfloat16)
        query, exact = 8 * query, attend_again(hot, 8 * query, step, 1.0).float()
        mass = live_mass(hot, query, step, 1.0)
        archive(hot, cold, step)
        found.append((exact, mass, bounds(cold, query, 1.0)[0]))
    (output, mass, bound), (exact, exact_mass, exact_bound) = found
    assert torch.equal(bound, exact_bound) and torch.equal(mass, exact_mass)
    torch.testing.assert_close(output, exact, atol=0.02, rtol=0.0)


def test_a_row_whose_query_is_no_number_takes_nothing_from_its_neighbours():
    step, back = torch.tensor([59, 30], dtype=torch.int32), []
    for spoilt in (False, True):
        hot, cold, query = stores(0)
        archive(hot, cold, step)
        if spoilt:
            query[0] = torch.nan
        assert revive(Alarm(share=0.01), hot, cold, query, step, 0.3)
        back.append(hot.positions(step)[1])
    assert back[0] == back[1] and len(back[0]) > 4


def test_the_living_mass_is_the_softmaxs_own():
    hot, _, query = stores(0)
    found = live_mass(hot, query, torch.tensor([59, 30], dtype=torch.int32), 0.3)
    for row, alive in enumerate((range(45, 60), range(26, 60))):
        keys = of_row(hot, row).transpose(1, 2).flatten(0, 1)[list(alive)].repeat_interleave(2, 1)
        exact = (keys * query[row]).sum(-1).mul(0.3).logsumexp(0)
        torch.testing.assert_close(found[row], exact)


def test_what_it_does_not_go_with():
    for how in ({"max_live_tokens": 9}, {"reversible": True}, {"max_bytes": 10**6}):
        with pytest.raises(UserError, match="an alarm brings keys back"):
            PrunedCache(alarm=Alarm(), **how)
    with pytest.raises(UserError, match="does not go with propagate_in_depth"):
        generate(gated(propagate_in_depth=True), tokens(1, 5), alarm=Alarm())
    for how, named in (({"share": 0.0}, "share is 0"), ({"share": 1.0}, "share is 1"), ({"grace": 0}, "grace is 0")):
        with pytest.raises(UserError, match=named):
            Alarm(**how)
