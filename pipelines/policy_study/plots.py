"""How do answers fall with the budget? Right answers against kept keys, cache bytes and measured time, per task."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipelines.canvas import LIGHT, Ink, panels, render, swatch
from pipelines.policy_study.table import LEARNED, rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEXT = "text"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#888888", TEXT, "#8C6D31", "#9467BD")
"""TEXT: that of the paper, black on white; on dark paper black could not be seen, nor could a darker violet."""
MARKERS = "os^vPXD*<>h"
AXES = {
    "answers_vs_kept.png": ("kept", "share of the context's keys that stay"),
    "answers_vs_bytes.png": ("cache", "cache bytes, of dense"),
    "answers_vs_time.png": ("token_of_dense", "measured time per token, of dense"),
}


def files(records: list[dict]) -> dict[str, bytes]:
    """Name and content of each plot that has anything to show."""
    return {name: render(draw, LIGHT, "png")[0] for name, draw in drawings(rows(records)).items()}


def drawings(made: list[dict]) -> dict[str, Callable[[Ink], Figure]]:
    """Name of each plot that these rows have anything to show in, and what draws it."""

    def drawing(field: str, label: str) -> Callable[[Ink], Figure]:
        return lambda ink: answers(made, field, label, ink)

    return {name: drawing(*axis) for name, axis in AXES.items() if any(row[axis[0]] is not None for row in made)}


def answers(made: list[dict], field: str, label: str, ink: Ink = LIGHT) -> Figure:
    """A panel per task, a line per method through its budgets, or across the panel where it keeps everything; bars from
    the lowest to the highest seed."""
    tasks = list(dict.fromkeys(row["task"] for row in made))
    methods = list(dict.fromkeys(row["method"] for row in made))
    figure, axes = panels(len(tasks))
    handles = []
    for place, method in enumerate(methods):
        colour = COLOURS[place % len(COLOURS)]
        look = {"color": ink.text if colour == TEXT else colour, "marker": MARKERS[place % len(MARKERS)]}
        learned = {row["decides"] for row in made if row["method"] == method} & set(LEARNED)
        look |= {"linewidth": 1.8 if learned else 1.0, "linestyle": "-" if learned else (0, (3, 2)), "markersize": 4}
        handles.append(swatch(method, **look))
        for task, axis in zip(tasks, axes, strict=True):
            points = [r for r in made if (r["task"], r["method"]) == (task, method) and r[field] is not None]
            if points and all(row["share"] == 1.0 for row in points):
                # What keeps everything is a height to look up to; a point so far right would press all others together.
                axis.axhline(points[0]["right"], color=look["color"], linewidth=1.0, linestyle=(0, (3, 2)))
                continue
            points.sort(key=lambda row: row[field])
            x, y = [row[field] for row in points], [row["right"] for row in points]
            spread = [
                [row["right"] - row["lowest"] for row in points],
                [row["highest"] - row["right"] for row in points],
            ]
            axis.errorbar(x, y, yerr=spread, capsize=2, elinewidth=0.8, **look)
    for task, axis in zip(tasks, axes, strict=True):
        axis.set_title(task, loc="left", fontweight="bold")
        axis.set_xlabel(label)
        axis.set_ylim(-0.02, 1.02)
        if math.isfinite(axis.dataLim.x1) and axis.dataLim.x1 > 0.0:
            axis.set_xlim(0.0, 1.05 * axis.dataLim.x1)  # one budget alone would be spread over the whole width
    axes[0].set_ylabel("questions answered")
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + 2.4, max(height, 0.19 * len(handles) + 1.0))
    figure.suptitle("Questions answered by each way to prune\n", x=0.01, ha="left", fontsize=11.5)
    # So far below the title in inches, however tall the figure is.
    below = 1.0 - 0.36 / figure.get_figheight()
    figure.text(0.01, below, "solid: learned on the task; *: has seen the questions", fontsize=8.5)
    # So many names need a column of their own beside the panels.
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    return figure
