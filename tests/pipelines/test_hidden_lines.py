"""Does a person read of the hidden benchmark what its records are worth?"""

from __future__ import annotations

import pytest

from pipelines.hidden_benchmark import lines


@pytest.mark.parametrize(
    ("dense", "said"),
    [
        ({"accuracy": 0.4}, None),
        ({"accuracy": 0.3}, "is no better than always saying the most frequent class"),
        ({"accuracy": 0.95, "f1": 0.0}, "finds no name"),
        ({"accuracy": 0.2, "f1": 0.1}, None),
    ],
)
def test_a_dense_model_that_has_learned_nothing_is_named(dense, said):
    found = lines.unlearned(dense, {"most_frequent": 0.3})
    assert (found is None) is (said is None) and (said is None or said in found)
