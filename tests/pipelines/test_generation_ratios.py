"""Are the ratios of the generation benchmark what its records say?"""

from __future__ import annotations

import pytest

from pipelines.generation_benchmark import lines, ratios
from pipelines.generation_benchmark.peers import DENSE, DYNAMIC, STATIC


def record(method: str, batch: int, context: int, ms: float, live: int, **more) -> dict:
    """A record as `measured` makes it, with a step that reads 1000 bytes of weights."""
    return {
        "method": method, "batch": batch, "context": context, "engine": method.split()[0],
        "pruned": "pruned" in method, "decode_ms": ms, "decode_mean_ms": ms + 1,
        "tokens_per_second": 1e3 * batch / ms, "prefill_seconds": ms,
        "cache_live_bytes": live, "cache_allocated_bytes": 2 * live, "step_bytes": 1000 + live, **more,
    }  # fmt: skip


def case(batch: int, context: int, mine: float, dense: float) -> list[dict]:
    pruned = record("ctxprune pruned 80%", batch, context, mine, 250)
    static = {"method": STATIC, "engine": "transformers", "batch": batch, "context": context, "pruned": False}
    return ratios.compared([
        pruned, record(DENSE, batch, context, dense, 1000), record(DYNAMIC, batch, context, 3 * dense, 1000),
        static | {"absent": "not today"},
    ])  # fmt: skip


def test_ratios_are_what_the_records_say():
    mine, dense, dynamic, static = case(2, 64, mine=4.0, dense=5.0)
    assert (mine["decode_speedup_over_dense"], mine["decode_speedup_over_dynamic"]) == (1.25, 3.75)
    assert mine["decode_mean_speedup_over_dense"] == 6.0 / 5.0
    assert mine["bytes_allow_over_dense"] == mine["bytes_allow_over_dynamic"] == 2000 / 1250
    assert mine["cache_share_of_dense"] == mine["allocated_share_of_dense"] == 0.25
    assert mine["prefill_speedup_over_dynamic"] == 3.75
    assert mine["decode_speedup_over_static"] is None and mine["bytes_allow_over_static"] is None
    assert dense["decode_speedup_over_dynamic"] == 3.0 and "decode_speedup_over_dense" not in dense
    assert "decode_speedup_over_dense" not in dynamic and "decode_speedup_over_dense" not in static
    assert (
        "over dense, dynamic: decoding 1.25x / 3.75x (by mean steps 1.20x / 3.20x, bytes allow 1.60x"
        in lines.comparison([mine, dense])
    )


def test_break_even_is_the_smallest_context_that_pays_and_null_where_none_does():
    records = [*case(1, 256, 3.0, 4.0), *case(1, 64, 5.0, 4.0), *case(1, 128, 4.0, 4.0), *case(8, 64, 5.0, 4.0)]
    found = {one["batch"]: one["break_even_context"] for one in ratios.break_even(records)}
    assert found == {1: 128, 8: None}


def test_each_method_is_compared_at_its_own_best_batch():
    records = [*case(1, 64, 1.0, 4.0), *case(8, 64, 16.0, 10.0)]
    found = {one["method"]: one for one in ratios.best(records)}
    assert {name: one["batch"] for name, one in found.items()} == {"ctxprune pruned 80%": 1, DENSE: 8, DYNAMIC: 8}
    assert found["ctxprune pruned 80%"]["speedup_over_dense"] == pytest.approx(1000 / 800)
    assert found["ctxprune pruned 80%"]["speedup_over_static"] is None and "speedup_over_dense" not in found[DENSE]
