"""Do the plots draw what was measured, and do their titles say only what is true of it?"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import canvas, plots, table

DENSE = ("dense", None, 10.0, 1.0)


def made(*trials, model="tiny"):
    """Rows of (policy, sparsity, perplexity, speed-up) trials."""
    return table.rows(
        [
            {
                "trial": f"{model}-{i}",
                "model": model,
                "policy": policy,
                "sparsity_target": sparsity,
                "sparsity": sparsity or 0.0,
                "perplexity": perplexity,
                "tokens_per_second": None if speed is None else speed * 100,
                "tokens_per_second_dense": 100.0,
                "tokens_per_second_spread": None if speed is None else [speed * 90, speed * 110],
            }
            for i, (policy, sparsity, perplexity, speed) in enumerate(trials)
        ]
    )


def curve(figure, axis=0):
    """The points of each line of a panel."""
    return [list(zip(*line.get_data(), strict=True)) for line in figure.axes[axis].lines]


def test_the_front_leaves_out_what_another_point_beats():
    assert plots.pareto_front([(1, 1.0), (2, 1.1), (1.5, 1.2), (3, 1.3)]) == [0, 1, 3]


def test_ties_in_one_coordinate_keep_the_better_point_and_duplicates_stay_together():
    assert plots.pareto_front([(1, 1), (1, 2), (2, 2), (2, 2), (3, 2)]) == [0, 4]
    assert plots.pareto_front([(1, 1), (1, 1)]) == [0, 1]


def test_points_without_a_number_never_take_part():
    assert plots.pareto_front([(math.nan, 0), (1, math.inf), (1, 1)]) == [2]
    assert plots.pareto_front([]) == []


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_every_point_off_the_front_is_beaten_by_one_on_it_and_none_on_it_is(points):
    front = plots.pareto_front(points)

    def beats(a, b):
        return a[0] >= b[0] and a[1] <= b[1] and a != b

    for i, point in enumerate(points):
        assert any(beats(points[j], point) for j in front) == (i not in front)


def test_a_policy_has_one_colour_and_no_two_known_policies_share_colour_or_marker():
    styles = [canvas.style(policy) for policy in ("dense", "learned", "window", "strided")]
    assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == 4
    assert canvas.style("h2o") == canvas.style("h2o") not in styles


def test_the_sparsity_plot_draws_each_policy_through_its_points_and_dense_across():
    figure = plots.perplexity_vs_sparsity(made(DENSE, ("learned", 0.9, 12.0, 2.0), ("learned", 0.5, 11.0, 1.5)))
    lines = curve(figure)
    assert [(0.5, 11.0), (0.9, 12.0)] in lines
    assert [(0, 10.0), (1, 10.0)] in lines  # x of a line across is in shares of the axis


def test_seeds_of_one_target_are_points_around_one_line():
    figure = plots.perplexity_vs_sparsity(made(("learned", 0.5, 11.0, 1.0), ("learned", 0.5, 13.0, 1.0)))
    assert curve(figure)[0] == [(0.5, 12.0)]


def test_each_model_has_its_own_panel():
    rows = made(DENSE, model="a") + made(DENSE, model="b")
    for draw in (plots.perplexity_vs_sparsity, plots.accuracy_vs_throughput):
        assert [axis.get_title(loc="left") for axis in draw(rows).axes] == ["a", "b"]


def test_the_sparsity_title_claims_a_win_only_where_every_fight_is_won():
    won = made(DENSE, ("learned", 0.8, 11.0, 2.0), ("window", 0.8, 12.0, 2.0))
    lost = made(DENSE, ("learned", 0.8, 11.0, 2.0), ("window", 0.8, 10.9, 2.0))
    assert "lower than the fixed rules" in plots.sparsity_title(won)
    neutral = plots.sparsity_title(lost)
    assert "lower" not in neutral
    assert plots.sparsity_title(won + made(("learned", 0.8, 3.0, 1), ("strided", 0.8, 2.0, 1), model="b")) == neutral
    assert plots.sparsity_title(made(DENSE, ("learned", 0.8, 11.0, 2.0), ("window", 0.9, 12.0, 2.0))) == neutral


def test_the_speed_title_quotes_the_fastest_trial_near_dense_and_nothing_slower_than_dense():
    rows = made(DENSE, ("learned", 0.8, 10.4, 1.8), ("learned", 0.9, 12.0, 3.0), ("window", 0.5, 10.1, 1.2))
    assert "1.80x as fast (tiny, learned 80%)" in plots.speed_title(rows)
    assert "fast" not in plots.speed_title(made(DENSE, ("learned", 0.8, 10.1, 0.7)))


def test_the_front_that_is_drawn_is_the_front_of_the_points():
    rows = made(DENSE, ("learned", 0.8, 10.5, 2.0), ("window", 0.8, 12.0, 1.5))
    assert curve(plots.accuracy_vs_throughput(rows))[0] == [(1.0, 1.0), (2.0, 1.05)]


def test_without_a_dense_speed_the_axis_is_tokens_per_second():
    rows = [row | {"speed_up": None} for row in made(DENSE, ("learned", 0.8, 10.5, 2.0))]
    figure = plots.accuracy_vs_throughput(rows)
    assert figure.axes[0].get_xlabel() == "tokens per second"
    assert curve(figure)[0] == [(100.0, 1.0), (200.0, 1.05)]


def test_a_rule_that_falls_apart_does_not_flatten_the_others():
    rows = made(DENSE, ("learned", 0.8, 11.0, 2.0), ("strided", 0.8, 400.0, 2.0))
    assert plots.perplexity_vs_sparsity(rows).axes[0].get_yscale() == "log"
    assert plots.perplexity_vs_sparsity(rows[:2]).axes[0].get_yscale() == "linear"


def test_training_draws_loss_above_sparsity_and_its_goal():
    rows = made(DENSE, ("learned", 0.8, 11.0, 2.0))
    steps = [{"step": s, "loss": 3.0 - s, "sparsity": s / 10, "sparsity_goal": s / 5} for s in (0, 1, 2)]
    curves = {"tiny-0": [row | {"sparsity": None} for row in steps], "tiny-1": steps}
    figure = plots.training(rows, curves)
    assert curve(figure)[0] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert curve(figure, 1) == [[(0, 0.0), (1, 0.2), (2, 0.4)], [(0, 0.0), (1, 0.1), (2, 0.2)]]
    assert plots.has_curves(rows, curves) and not plots.has_curves(rows, {"elsewhere": steps})


@pytest.mark.parametrize("name", [r"$\frac{$", "<script>", "x" * 300, "a\nb\x1b[2J", "\N{HIRAGANA LETTER A}"])
@pytest.mark.parametrize("draw", [plots.perplexity_vs_sparsity, plots.accuracy_vs_throughput])
def test_any_name_can_be_drawn(draw, name):
    rows = made(DENSE, ("learned", 0.8, 11.0, 2.0), model=name)
    assert canvas.render(lambda ink: draw(rows, ink), canvas.DARK, "svg")[0].startswith(b"<?xml")


@pytest.mark.parametrize("draw", [plots.perplexity_vs_sparsity, plots.accuracy_vs_throughput])
def test_nothing_measured_is_said_and_not_a_crash(draw):
    figure = draw(made(("learned", 0.8, None, None)))
    assert [text.get_text() for text in figure.axes[0].texts] == ["no finished trial has these numbers"]


def test_drawing_leaves_no_settings_and_no_open_figures_behind():
    import matplotlib
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    canvas.render(lambda ink: plots.perplexity_vs_sparsity(made(DENSE), ink), canvas.DARK, "png")
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []
