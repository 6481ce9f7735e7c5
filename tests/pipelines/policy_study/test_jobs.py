"""Is a point of the study a function of what it is asked, whatever its worker has done before?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipelines.policy_study import jobs
from pipelines.policy_study.methods import named


def test_a_point_starts_from_its_seed_whatever_was_drawn_before(monkeypatch, tmp_path):
    """Gates and networks are made from torch's generator, which the points before it have moved on."""

    class Made(Exception):
        """The model would be made now, from these numbers."""

    def made(*_, **__):
        raise Made(torch.rand(2).tolist())

    monkeypatch.setattr(jobs, "retrofitted", made)
    for name in ("small", "measure", "predictions"):
        monkeypatch.setattr(jobs, name, lambda *_: None)
    monkeypatch.setattr(jobs.ctxprune, "retrofit", lambda *_: None)

    def begun(seed: int, before: int) -> list[float]:
        torch.manual_seed(before)
        with pytest.raises(Made) as caught:
            jobs._measured(
                tmp_path, jobs.point_inputs(jobs.model_inputs("recall", 4, seed), "random", 0.5, 64), tmp_path
            )
        return caught.value.args[0]

    assert begun(0, before=1) == begun(0, before=2) != begun(1, before=1)


def test_where_one_way_changes_its_points_alone_are_measured_again(monkeypatch):
    model = jobs.model_inputs("recall", 4, 0)

    def inputs(edition: int) -> list[dict]:
        ways = [replace(way, edition=edition if way.name == "DMS" else 1) for way in named(["SnapKV", "DMS"])]
        monkeypatch.setattr(jobs, "named", lambda names: [way for way in ways if way.name in names])
        return [jobs.point_inputs(model, way.name, 0.5, 64) for way in ways]

    (same, first), (unchanged, second) = inputs(1), inputs(2)
    assert same == unchanged and first != second
