"""Are the rows of the table the numbers of the results, compared fairly and shown as they are?"""

from __future__ import annotations

import csv
import io

import pytest
from rich.console import Console

from pipelines import table
from tests.results import result


def shown(made, width=200, **options):
    console = Console(file=io.StringIO(), width=width, markup=True)
    console.print(table.terminal(made, **options))
    return console.file.getvalue()


def test_the_ratio_is_to_the_dense_trial_of_the_same_model():
    dense = {"policy": "dense", "target": None}
    results = [
        result("a", "tiny", perplexity=12.0),
        result("b", "big", perplexity=9.0),
        result("tiny-dense", "tiny", **dense, perplexity=10.0),
        result("big-dense", "big", **dense, perplexity=6.0),
        result("alone", "other", perplexity=5.0),
    ]
    assert [row["vs_dense"] for row in table.rows(results)] == [1.2, 1.5, 1.0, 1.0, None]


def test_with_several_dense_trials_the_one_of_the_same_seed_is_the_reference():
    results = [
        result("d0", policy="dense", target=None, perplexity=10.0, seed=0),
        result("d1", policy="dense", target=None, perplexity=20.0, seed=1),
        result("l1", perplexity=30.0, seed=1),
    ]
    assert [row["vs_dense"] for row in table.rows(results)] == [1.0, 1.0, 1.5]


def test_a_dense_trial_that_was_trained_otherwise_is_no_reference():
    dense = {"policy": "dense", "target": None}
    results = [
        result("slow", **dense, perplexity=20.0, setting="1"),
        result("fast", **dense, perplexity=10.0, setting="2"),
        result("l", perplexity=30.0, setting="2"),
        result("m", perplexity=30.0, setting="3"),
    ]
    assert [row["vs_dense"] for row in table.rows(results)] == [1.0, 1.0, 3.0, None]
    assert [row["model"] for row in table.rows(results)][:2] == ["tiny, set-up 1", "tiny, set-up 2"]


def test_trials_of_several_set_ups_are_models_of_their_own_and_shown_by_name():
    given = (("learned", 9.0, "1"), ("window", 10.0, "1"), ("window", 8.0, "2"))
    made = table.rows([result(p + s, policy=p, perplexity=value, setting=s) for p, value, s in given])
    (judged,) = [column for column in table.columns(made) if column.key == "perplexity"]
    assert [table.is_best(row, judged, made) for row in made] == [True, False, False]
    assert "trial" in [column.key for column in table.columns(made)]
    assert "set-up" not in shown(table.rows([result("a", setting="1"), result("b", target=0.9, setting="1")]))


def test_derived_numbers_divide_what_was_measured_together():
    speeds = {"tokens_per_second": 300.0, "tokens_per_second_dense": 200.0, "cache_bytes": 25, "cache_bytes_dense": 100}
    (row,) = table.rows([result("a", perplexity=11.0, perplexity_soft=10.0, **speeds)])
    assert (row["speed_up"], row["cache_ratio"]) == (1.5, 0.25)
    assert row["soft_gap"] == pytest.approx(0.1)


def test_the_longest_context_is_the_same_for_every_row():
    results = [result("a", perplexity_at={"64": 3.0, "128": 2.0}), result("b", perplexity_at={"64": 4.0})]
    made = table.rows(results)
    assert [(row["longest_context"], row["perplexity_at_longest"]) for row in made] == [(128, 2.0), (128, None)]


@pytest.mark.parametrize("value", [None, "3", True, float("nan"), float("inf"), [1], {}])
def test_what_is_not_a_finite_number_was_not_measured(value):
    assert table.number({"a": value}, "a") is None
    assert table.number({}, "a") is None
    assert table.number({"a": {"b": 2}}, "a", "b") == 2


def test_only_a_fair_fight_has_a_best():
    def best(*results):
        made = table.rows(list(results))
        column = next(c for c in table.columns(made) if c.key == "perplexity")
        return [row["trial"] for row in made if table.is_best(row, column, made)]

    learned, window = result("l", perplexity=11.0), result("w", policy="window", perplexity=12.0)
    dense = result("d", policy="dense", target=None, perplexity=10.0)
    assert best(dense, learned, window) == ["l"]
    assert best(dense, learned | {"perplexity": 13.0}, window) == ["w"]
    assert best(dense, learned) == []
    assert best(learned | {"sparsity": 0.7}, window) == []  # it missed its budget: fewer keys dropped is no victory
    assert best(learned | {"perplexity": 12.0}, window) == []


def test_trials_that_look_alike_are_told_apart_by_name():
    seeds = table.rows([result("seed-0", seed=0), result("seed-1", seed=1)])
    assert "seed-1" in table.markdown(seeds)
    assert "alone" not in table.markdown(table.rows([result("alone")]))


def test_text_that_a_spreadsheet_would_run_is_quoted_and_negative_numbers_stay_numbers():
    bad = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"]
    made = table.rows([result(name, perplexity=9.0, perplexity_soft=10.0) for name in bad])
    cells = list(csv.DictReader(io.StringIO(table.comma_separated(made), newline="")))
    assert [cell["trial"] for cell in cells] == ["'" + name for name in bad]
    assert all(float(cell["soft_gap"]) == pytest.approx(-0.1) for cell in cells)


def test_csv_holds_the_raw_numbers_and_leaves_the_unknown_empty():
    made = table.rows([result("a", perplexity=1 / 3)])
    (cell,) = csv.DictReader(io.StringIO(table.comma_separated(made)))
    assert float(cell["perplexity"]) == 1 / 3
    assert cell["tokens_per_second"] == ""
    assert list(cell) == list(made[0])


def test_a_markdown_row_has_one_cell_per_column_whatever_its_name():
    made = table.rows([result("a", model="a|b\n| c \\| <i>")])
    lines = table.markdown(made).splitlines()
    assert len(lines) == 3
    unescaped = lines[2].replace("\\\\", "").replace("\\|", "")
    assert unescaped.count("|") == lines[0].count("|")
    assert "\\<i>" in lines[2]


def test_a_name_is_never_terminal_markup_or_an_escape_sequence():
    text = shown(table.rows([result("a", model="[red]x[/red]\x1b[2J")]))
    assert "[red]x[/red]" in text
    assert "\x1b" not in text


def test_the_narrow_table_fits_eighty_characters():
    dense = result("d", policy="dense", target=None)
    numbers = {"tokens_per_second": 123456.0, "tokens_per_second_dense": 1000.0, "perplexity": 123456.0}
    text = shown(table.rows([dense, result("a", **numbers)]), width=80, narrow=True)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "123.46x" in text and "perplexity" in text


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536 * 1024, "1.50 MiB"), (2**50, "1024 TiB")],
)
def test_bytes_are_told_in_binary_units(count, told):
    assert table.human_bytes(count) == told
