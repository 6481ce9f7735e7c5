"""Is a point of the study a function of what it is asked, whatever its worker has done before?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ctxprune import tasks
from pipelines.policy_study import jobs, run, small_model, table
from pipelines.policy_study.config import StudyConfig
from pipelines.policy_study.fine_tune import FineTuning, fine_tune
from pipelines.policy_study.measure import measure
from pipelines.policy_study.methods import METHODS, named, retrofitted


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


def test_what_keeps_everything_is_measured_once_and_not_at_every_share():
    methods = named(["random", "dense, fine-tuned", "agent"])
    planned = [(share, [one.name for one in some]) for share, some in run.by_share(StudyConfig(shares=[0.5]), methods)]
    assert planned == [(0.5, ["random", "agent"]), (1.0, ["dense, fine-tuned"])]
    assert run.by_share(StudyConfig(shares=[0.5]), named(["random"])) == [(0.5, named(["random"]))]


def test_a_dense_model_that_is_fine_tuned_keeps_everything():
    task = tasks.RecallConfig(length=32, facts=3, decoys=2, keys=8, values=8, fillers=8)
    (way,) = named(["dense, fine-tuned"])
    quick = replace(way, prepare=lambda *given: fine_tune(*given[:2], FineTuning(steps=2)))
    notes: dict[str, float] = {}
    model = retrofitted(quick, small_model.build(task.vocab_size, small_model.Shape(), 0), task, 1.0, 0, notes=notes)
    assert (measure(model, task, 64).kept == 1.0).all() and notes["key_bytes"] == 1.0


def test_a_window_does_not_count_as_learning_what_to_keep():
    kinds = {method.name: method.kind for method in METHODS}
    assert {kinds[name] for name in ("recency, fine-tuned", "dense, fine-tuned", "agent, no features")} == {"control"}
    assert {kinds[name] for name in ("learned gates", "DMS", "agent", "LTP")} <= set(table.LEARNED)
