"""How does a stranger read a study of policies? Its table, its verdicts and its plots as sections of the report."""

from __future__ import annotations

import json
from html import escape
from itertools import groupby
from pathlib import Path

from ctxprune.errors import UserError
from pipelines import canvas, page
from pipelines.policy_study import losses, plots, table
from pipelines.table import escape_markdown, number

POINTS = "points.jsonl"
UNKNOWN = ("agreement", "precision", "recall", "kept_and_difficulty", "seed")
UNKNOWN += ("read_of_dense", "token_of_dense", "deciding_ms", "taught_in", "foreseen", "foreseen_right", *table.CLOCK)
UNKNOWN += ("against_dense", *(f"against_dense_{end}" for end in table.ENDS))
"""Numbers that a point need not have."""
REACHED = ("even_from", "repaid")
"""Numbers that are looked for only in some points: there, none says that it was not found."""


def points(folder: Path) -> list[dict]:
    """The points of a study in a folder, in their order; none where there is no such file. UserError for a line that is
    not a point, and for a file without any."""
    path = folder / POINTS
    if not path.is_file():
        return []
    found = []
    for place, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            point = json.loads(line)
        except ValueError:
            point = None
        if not _is_point(point):
            raise UserError(f"{path}: line {place} is not a point of a study; run the study again to write it anew")
        told = {name: number(point, name) for name in (*UNKNOWN, *(name for name in REACHED if name in point))}
        found.append(point | told)
    if not found:
        raise UserError(f"{path} is empty: run the study again, it goes on where it stopped")
    return found


def _is_point(point: object) -> bool:
    if not isinstance(point, dict) or not all(isinstance(point.get(k), str) for k in ("task", "method", "decides")):
        return False
    if not all(isinstance(point.get(name), bool) for name in ("aware", "adaptive")):
        return False
    return None not in [number(point, name) for name in ("share", "right", "kept", "cache")] and point["share"] > 0


def headlines(records: list[dict]) -> list[str]:
    """Who wins at each budget, a sentence each."""
    return [f"{line}." for line in table.verdicts(table.rows(records))]


def sections(records: list[dict], images: dict[str, tuple[bytes, bytes]]) -> str:
    """HTML; images maps a plot's name to its SVG on light and on dark paper. Every piece of data is escaped."""
    made = table.rows(records)
    lost = losses.losers(made)
    return page.filled(
        Path(__file__).with_name("study.html"),
        tables="".join(
            f"<h3>{escape(_title(*key))}</h3>{_table(list(group))}"
            for key, group in groupby(made, lambda row: (row["task"], row["share"]))
        ),
        notes=escape(table.NOTES),
        verdicts=page.items(table.verdicts(made) or ["No budget has both learned and other methods."]),
        compared=escape(losses.compared(made)),
        losses=f"<ul>{page.items(lost)}</ul>" if lost else "",
        plots="".join(page.figure(_caption(name), *both) for name, both in images.items()),
        conditions=page.items(page.conditions(records)),
    )


def markdown(records: list[dict]) -> str:
    """The tables, and the sentences on where learning does not win, as Markdown."""
    made = table.rows(records)
    lost = [losses.compared(made), *losses.losers(made)]
    listed = "".join(f"- {escape_markdown(line)}\n" for line in lost)
    return f"{table.markdown(records)}\n## Where learning does not win, sentence by sentence\n\n{listed}"


def whole(name: str, records: list[dict], images: dict[str, tuple[bytes, bytes]]) -> str:
    """The page of a folder that holds a study and no sweep."""
    seeds = len({record.get("seed") for record in records})
    state = f"{len(records)} points, {seeds} seed{'s' if seeds > 1 else ''}"
    return page.frame(name, state, headlines(records), [], sections(records, images))


def drawn(records: list[dict]) -> dict[str, tuple[bytes, bytes, bytes]]:
    """Of each plot, by its name: PNG, and SVG on light and on dark paper."""
    found = {}
    for name, draw in plots.drawings(table.rows(records)).items():
        png, light = canvas.render(draw, canvas.LIGHT, "png", "svg")
        found[Path(name).stem] = (png, light, *canvas.render(draw, canvas.DARK, "svg"))
    return found


def _title(task: str, share: float) -> str:
    return f"{task}, {share:.3g} of the context's bytes stay"


def _caption(name: str) -> str:
    return f"Questions answered against {plots.AXES[f'{name}.png'][1]}; bars span the lowest and highest seed."


def _table(made: list[dict]) -> str:
    # What no row of it knows is left out: the page is narrower than the whole table.
    columns = [column for column in table.COLUMNS if any(column[2](row) for row in made)]
    side = {name: "" if form.startswith(">") else ' class="name"' for name, form, _ in columns}
    head = "".join(f'<th scope="col"{side[name]}>{escape(name)}</th>' for name in side)
    body = "".join(
        "<tr>" + "".join(f"<td{side[name]}>{escape(say(row) or '-')}</td>" for name, _, say in columns) + "</tr>"
        for row in made
    )
    region = '<div class="scroll" tabindex="0" role="region" aria-label="Table of results">'
    return f"{region}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
