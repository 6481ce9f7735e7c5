"""Are batches equally hard, so that a policy which keeps more of hard rows keeps as much of one batch as of another?"""

from __future__ import annotations

import pytest

from ctxprune.tasks.overwrite import OverwriteConfig
from ctxprune.tasks.questions import QuestionsConfig
from ctxprune.tasks.recall import RecallConfig


@pytest.mark.parametrize("task", [RecallConfig(), QuestionsConfig(), OverwriteConfig()], ids=lambda task: task.name)
def test_batches_are_equally_hard_and_their_rows_in_no_order(task):
    batches = [task.batch("test", 0, index, 64).difficulty for index in range(4)]
    counts = [batch.unique(return_counts=True)[1] for batch in batches]
    assert all(count.max() - count.min() <= 1 and len(count) > 2 for count in counts)
    assert not any(batch.equal(batch.sort().values) for batch in batches) and not batches[0].equal(batches[1])
    # A batch of one row is not always the easiest.
    assert len({task.batch("test", 0, index, 1).difficulty.item() for index in range(40)}) == len(counts[0])
