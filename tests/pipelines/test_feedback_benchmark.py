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


def test_an_open_model_agrees_with_itself():
    record = next(feedback_benchmark.records(gated(beta=1e4).double(), tokens(2, 20), 5, 1))
    assert record["agreement"] == 1.0 and abs(record["divergence"]) < 1e-12


def test_every_record_has_its_line(records):
    for record in records:
        assert record["method"].split(",")[0] in feedback_benchmark.line(record)
