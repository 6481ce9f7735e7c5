"""Does a report show a study of policies, its losers first of all?"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from ctxprune.errors import UserError
from pipelines.canvas import DARK, LIGHT
from pipelines.policy_study import losses, page, plots, table
from pipelines.report import report
from tests.pipelines.test_page import Reader

ROOT = Path(__file__).resolve().parents[3]


def record(method: str, decides: str, right: float, seed: int = 0, **more) -> dict:
    base = {"task": "recall", "share": 0.25, "method": method, "decides": decides, "seed": seed}
    base |= {"adaptive": False, "aware": False, "right": right, "kept": 0.25}
    found = dict.fromkeys(page.UNKNOWN) | base | more
    return {"cache": found["kept"]} | found


def several(method: str, decides: str, rights, **more) -> list[dict]:
    return [record(method, decides, right, seed, **more) for seed, right in enumerate(rights)]


WINS = [*several("H2O", "attention", (0.8, 0.9)), *several("agent", "reward", (0.95, 0.97))]
PLANTED = [
    (
        several("LTP", "taught", (0.5, 0.6)),
        "recall at 0.25: LTP (0.550, 0.500 to 0.600 in 2 seeds) does not beat H2O (0.850, 0.800 to 0.900 in 2 seeds), "
        "the best whose choice is not learned: it answers less with every seed.",
    ),
    (
        several("LTP", "taught", (0.7, 0.99)),
        "recall at 0.25: LTP (0.845, 0.700 to 0.990 in 2 seeds) does not beat H2O (0.850, 0.800 to 0.900 in 2 seeds), "
        "the best whose choice is not learned: some seeds answer less.",
    ),
    (
        several("LTP", "taught", (0.8, 0.9)),
        "recall at 0.25: LTP (0.850, 0.800 to 0.900 in 2 seeds) does not beat H2O (0.850, 0.800 to 0.900 in 2 seeds), "
        "the best whose choice is not learned: every seed answers as much.",
    ),
    (
        several("LTP", "taught", (0.99, 0.99), kept=0.26),
        "recall at 0.25: LTP missed its budget: it kept 0.260 of the bytes with one seed, 4.0% more than asked.",
    ),
    (
        several("LTP", "taught", (0.99, 0.99), read_of_dense=1.2, token_of_dense=1.05),
        "recall at 0.25: LTP reads the context in 1.20x the time of dense and decodes a token in 1.05x the time of "
        "dense.",
    ),
]


@pytest.mark.parametrize(("more", "sentence"), PLANTED, ids=["below", "overlap", "tie", "budget", "slow"])
def test_a_planted_loss_is_one_sentence(more, sentence):
    assert losses.losers(table.rows(WINS + more)) == [sentence]
    assert "lost none" not in losses.compared(table.rows(WINS + more))


def test_seeds_of_other_models_are_not_set_against_each_other():
    """Another machine trains another model from the same seed: what it answers with everything kept tells."""
    first = [record("H2O", "attention", right, seed, against_dense=-0.1) for seed, right in enumerate((0.8, 0.9))]

    def beside(*rights: float, against: float) -> list[dict]:
        again = [record("LTP", "taught", right, seed, against_dense=against) for seed, right in enumerate(rights)]
        return table.rows(first + again)

    one, other = beside(0.81, 0.91, against=-0.05)
    assert table.differences(other, one) == [] and not table.better(other, one)
    (told,) = losses.losers([one, other])
    assert told.endswith("their models differ, and their ranges overlap.")
    one, same = beside(0.81, 0.91, against=-0.09)
    assert table.better(same, one) and table.differences(same, one) == pytest.approx([0.01, 0.01])
    told = [one | {"model": "a" if one["method"] == "H2O" else "b"} for one in first]
    again = [record("LTP", "taught", right, seed, model="b") for seed, right in enumerate((0.81, 0.91))]
    assert table.differences(*table.rows(told + again)) == []
    again = [one | {"model": "ab"[one["seed"]]} for one in again]
    assert table.differences(*table.rows(told + again)) == [], "of two seeds only one is of the same model"
    one, apart = beside(0.95, 0.97, against=-0.03)
    assert table.better(apart, one)


def test_one_seed_says_little_and_a_missed_budget_is_named():
    (line,) = table.verdicts(table.rows([record("H2O", "attention", 0.8, 0), record("agent", "reward", 0.9, 0)]))
    assert line.endswith("; one seed says little")
    (line,) = table.verdicts(table.rows([*WINS, *several("DMS", "fine-tuned", (0.98, 0.99), kept=0.26)]))
    assert line.endswith("(not at its budget: DMS)")


def test_a_point_with_a_number_that_is_none_is_read_without_it(tmp_path):
    folder = written(tmp_path / "policies", [WINS[0] | {"taught_in": "fast", "even_from": "soon", "repaid": None}])
    (found,) = page.points(folder)
    assert (found["taught_in"], found["even_from"], found["repaid"]) == (None, None, None)
    assert table.rows([found])[0]["taught_in"] is None


def test_who_is_better_on_every_model_loses_nothing_though_ranges_overlap():
    """A seed is the same model and the same questions for both."""
    made = table.rows([*several("H2O", "attention", (0.8, 0.9)), *several("LTP", "taught", (0.85, 0.95))])
    assert losses.losers(made) == []
    assert "better on every seed's model, though their ranges overlap" in table.verdicts(made)[0]


def test_a_planted_win_is_not_a_loss_and_what_was_compared_is_said():
    made = table.rows([*WINS, *several("oracle", "control", (1.0, 1.0), aware=True)])
    assert losses.losers(made) == []
    assert losses.compared(made) == (
        "1 learned and 2 other results were compared, over at least 2 seeds; of the learned ones 0 were timed. "
        "Learning lost none of these comparisons."
    )


def written(folder: Path, records: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / page.POINTS).write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def test_a_folder_with_points_becomes_a_page_with_table_plot_and_losers(tmp_path):
    evil = "<script>x</script>"
    folder = written(tmp_path / "policies", [*WINS, *PLANTED[0][0], *several(evil, "taught", (0.1, 0.1))])
    out = io.StringIO()
    report(folder, json_lines=False, out=out)
    made = {path.name for path in (folder / "report").iterdir()}
    assert made == {"answers_vs_kept.png", "answers_vs_bytes.png", "table.md", "index.html"}
    html = (folder / "report" / "index.html").read_text()
    reader = Reader(html)
    assert reader.open == [] and "$" not in reader.text and "script" not in reader.tags and evil in reader.text
    assert PLANTED[0][1] in reader.text and html.count("<tr>") == 5
    assert reader.tags.count("img") == 2 and html.count("data:image/svg+xml") == 4
    assert "learned best is agent (0.960)" in reader.text
    assert PLANTED[0][1] in (folder / "report" / "table.md").read_text()
    assert "learned best is agent" in out.getvalue() and "index.html" in out.getvalue()


def test_json_lines_are_the_points(tmp_path):
    folder, out = written(tmp_path / "policies", WINS), io.StringIO()
    report(folder, json_lines=True, out=out)
    assert [json.loads(line) for line in out.getvalue().splitlines()] == WINS


def test_numbers_that_are_not_there_or_none_are_left_blank(tmp_path):
    odd = {"read_of_dense": "fast", "seed": [1], "deciding_ms": None}
    (point,) = page.points(written(tmp_path, [{k: v for k, v in WINS[0].items() if k != "recall"} | odd]))
    assert point == WINS[0] | dict.fromkeys((*odd, "recall"))
    assert "H2O" in page.whole("x", [point], {})


def test_the_study_that_comes_with_the_repository_can_be_shown():
    records = page.points(ROOT / "results" / "policies")
    text = Reader(page.whole("policies", records, {})).text
    assert f"{len(records)} points, 3 seeds" in text
    for line in table.unfair(table.rows(records)):
        assert line.split(" kept ")[0] + " missed its budget" in text


WHOLE = record("x", "taught", 0.5)
WRONG = {"share": 0, "right": None, "kept": float("nan"), "aware": 1, "task": 3}
BROKEN = ["", "{", "[]", *(json.dumps(WHOLE | {name: value}) for name, value in WRONG.items())]


@pytest.mark.parametrize("line", BROKEN)
def test_a_file_that_holds_no_study_is_refused_in_one_line(tmp_path, line):
    (tmp_path / page.POINTS).write_text(line and line + "\n")
    with pytest.raises(UserError, match=r"points\.jsonl.* run the study again") as caught:
        report(tmp_path, json_lines=False, out=io.StringIO())
    assert "\n" not in str(caught.value) and not (tmp_path / "report").exists()


def test_columns_that_no_row_knows_are_left_out_and_gaps_are_dashes():
    made = [record("H2O", "attention", 0.8, token_of_dense=1.2), record("agent", "reward", 0.9)]
    html = page.sections(made, {})
    assert ">token</th>" in html and ">reading</th>" not in html and ">precision</th>" not in html
    assert "<td>1.20x</td>" in html and "<td>-</td>" in html and "<td></td>" not in html


@pytest.mark.parametrize("ink", [LIGHT, DARK], ids=["light", "dark"])
def test_every_line_of_a_plot_stands_out_from_its_paper(ink):
    """WCAG's contrast ratio; 3 is its least for graphics, and the paler colours of the palette miss it on white."""
    made = table.rows([record(f"way {place}", "control", place / 20) for place in range(len(plots.COLOURS))])
    (axis,) = plots.answers(made, "kept", "kept", ink).axes
    lines = {line.get_color() for line in axis.get_lines()} - {"none"}
    paper = luminance(ink.paper)
    for colour in lines:
        low, high = sorted((luminance(colour), paper))
        assert (high + 0.05) / (low + 0.05) >= 2.2, f"{colour} on {ink.paper}"


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
