"""Does the benchmark of the feedback loops say what happened?"""

from __future__ import annotations

import pytest

from pipelines import feedback_benchmark
from tests.models import gated, tokens


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return list(feedback_benchmark.records(gated(beta=1.5).double(), tokens(3, 40), 10, 1))


def test_agreement_with_the_dense_model_rises_with_what_comes_back(records):
    ways = records[:-1]
    assert [one["method"] for one in ways] == ["pruned", *(f"alarm, share {s:g}" for s in feedback_benchmark.SHARES)]
    assert ways[0]["divergence"] > ways[-1]["divergence"] >= 0
    assert ways[0]["live_tokens"] < ways[-1]["live_tokens"] <= 40
    assert all(0 <= one["agreement"] <= 1 and one["ms_per_step"] > 0 for one in ways)
    assert ways[-1]["revived_per_step"] > 0 and 0 < ways[-1]["alarms"] <= 1


def test_the_lossless_text_is_the_dense_models(records):
    lossless = records[-1]
    assert lossless["differing_tokens"] == 0 and lossless["tokens"] == 90
    assert 0 < lossless["acceptance"] < 1 and lossless["speedup"] > 0 and lossless["drafts_per_pass"] > 0


def test_the_lossless_record_says_where_it_was_measured(records):
    lossless = records[-1]
    assert (lossless["rows"], lossless["prompt_tokens"], lossless["new_tokens"], lossless["repeats"]) == (3, 10, 30, 1)
    assert lossless["speedup_spread"] == [lossless["speedup"]] * 2 and lossless["speedup_with_prompts"] > 0
    # Two layers, 3 rows of 10 tokens, keys and values in float64.
    config = gated().config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    assert lossless["cache_bytes"] == config.num_hidden_layers * 3 * 10 * 2 * width * 8
    assert lossless["cache_over_weights"] == lossless["cache_bytes"] / lossless["weight_bytes"]
    assert 0 < lossless["draft_cache_share"] < 2


@pytest.mark.parametrize("loop", feedback_benchmark.LOOPS)
def test_one_loop_alone_is_measured(loop):
    found = list(feedback_benchmark.records(gated(beta=1.5).double(), tokens(2, 20), 10, 1, [loop], 2))
    assert {one["method"] == "lossless" for one in found} == {loop == "lossless"}
    assert loop == "alarm" or found[0]["drafts_per_pass"] == pytest.approx(2, abs=0.5)


def test_sampled_text_is_timed_and_not_compared():
    model = gated(beta=1.5).double()
    (record,) = feedback_benchmark.records(model, tokens(2, 20), 10, 1, ["lossless"], 2, 0.7)
    assert record["differing_tokens"] is None and record["differing_rows"] is None and record["temperature"] == 0.7
    assert record["tokens"] == 20 and record["speedup"] > 0
    assert feedback_benchmark.line(record).startswith("lossless: 20 tokens sampled at temperature 0.7; ")


def test_a_record_of_before_has_its_line_too():
    before = {"method": "lossless", "differing_tokens": 0, "tokens": 90, "acceptance": 0.5, "drafts_per_pass": 2.0}
    line = feedback_benchmark.line(before | {"speedup": 0.5, "expected_speedup": 0.9})
    assert line.endswith("0.50x dense speed (0.90x by the bytes moved)")


def test_an_open_model_agrees_with_itself():
    record = next(feedback_benchmark.records(gated(beta=1e4).double(), tokens(2, 20), 5, 1))
    assert record["agreement"] == 1.0 and abs(record["divergence"]) < 1e-12


def test_every_record_has_its_line(records):
    for record in records:
        assert record["method"].split(",")[0] in feedback_benchmark.line(record)
