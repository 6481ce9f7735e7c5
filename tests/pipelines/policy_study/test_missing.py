"""What does a study show when some of its models or points failed, or thresholds had to be set again?"""

from __future__ import annotations

from pipelines.policy_study import clock, page, plots, table
from pipelines.policy_study.config import StudyConfig
from pipelines.policy_study.methods import named
from pipelines.progress import Bars


def point(method: str, decides: str, seed: int, **more) -> dict:
    base = {"task": "recall", "share": 0.25, "method": method, "decides": decides, "seed": seed, "right": 0.5}
    return dict.fromkeys(page.UNKNOWN) | base | {"adaptive": False, "aware": False, "kept": 0.25, "cache": 0.25} | more


def test_a_mean_over_fewer_seeds_than_others_have_says_so():
    records = [point("H2O", "attention", 0), point("H2O", "attention", 1), point("random", "control", 1)]
    lines = table.markdown(records).splitlines()
    (whole,), (part,) = ([line for line in lines if line.startswith(f"| {name} ")] for name in ("H2O", "random"))
    assert "(1 of 2 seeds)" in part and "seeds)" not in whole


def test_thresholds_that_were_set_again_are_named_with_what_they_would_have_kept():
    again = [point("agent", "reward", seed, foreseen=kept) for seed, kept in enumerate((0.251, 0.246))]
    said = "recall at 0.25: agent would have kept 0.246"
    assert f"set again: {said}" in table.text(again) and f"- {said}" in table.markdown(again)
    assert "would have kept" not in table.markdown(again[:1]) + table.markdown([point("agent", "reward", 0)])


def test_the_interval_against_dense_spans_those_of_all_seeds_and_is_left_out_where_none_was_made():
    ends = [(-0.31, -0.28), (-0.30, -0.25)]
    records = [
        point("H2O", "attention", seed, against_dense_low=low, against_dense_high=high)
        for seed, (low, high) in enumerate(ends)
    ]
    assert "| -0.310 to -0.250 |" in table.markdown(records) and "-0.310 to -0.250" in table.text(records)
    assert " to -0" not in table.markdown([point("H2O", "attention", 0)])


def test_what_keeps_everything_is_a_line_across_and_does_not_stretch_the_plot():
    whole = point("dense, fine-tuned", "control", 0, right=0.9) | {"share": 1.0, "kept": 1.0, "cache": 1.0}
    figure = plots.answers(table.rows([point("H2O", "attention", 0), whole]), "cache", "bytes")
    (axis,) = figure.axes
    assert axis.get_xlim()[1] < 0.5 and [0.9, 0.9] in [list(line.get_ydata()) for line in axis.lines]


def test_what_is_answered_with_everything_kept_is_said_where_it_is_known():
    records = [point("H2O", "attention", seed, against_dense=-0.1 * (1 + seed)) for seed in range(2)]
    for said in (table.text(records), table.markdown(records)):
        assert "With everything kept 0.650 (0.600 to 0.700) is right." in said
    assert "everything kept" not in table.markdown([point("H2O", "attention", 0)]).split("right:")[0]


def test_ways_that_share_no_seed_are_not_held_against_each_other():
    records = [point(table.CONSTANT, "attention", 0), point("agent", "reward", 1)]
    assert table.against_constant(table.rows(records)) == []
    assert table.against_constant(table.rows([*records, point("agent", "reward", 0)])) != []


def test_a_task_whose_first_model_failed_is_not_timed_and_the_rest_of_the_table_stands(tmp_path):
    study = StudyConfig(tasks=["recall"], seeds=[0], shares=[0.25])
    with Bars() as bars:
        assert clock.timed(study, {"recall": None}, named(["random"]), tmp_path, bars) == {}


def test_a_task_without_times_has_an_empty_panel_beside_one_that_has_some():
    timed = point("H2O", "attention", 0, token_of_dense=0.9)
    assert "answers_vs_time.png" in plots.files([timed, point("H2O", "attention", 0) | {"task": "needle"}])
