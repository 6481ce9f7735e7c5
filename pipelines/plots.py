"""What does a sweep look like? Perplexity against sparsity and against decoding speed, and the training curves."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise
from statistics import mean
from typing import TYPE_CHECKING

from pipelines.canvas import LIGHT, Ink, finish, logarithmic, panels, short, style, swatch
from pipelines.table import SAME_BUDGET, number, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":", "-.")
FRONT = {"linewidth": 1, "alpha": 0.55, "linestyle": (0, (4, 2))}
CLOSE = 0.05
"""The title of the speed plot speaks of trials whose perplexity is at most this far above dense (0.05 = 5 %)."""


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points (x: higher is better, y: lower is better) that no other point beats, by x then y.

    A point is beaten by one that is at least as good in both and better in one, so exact duplicates stay together.
    Points with a coordinate that is not finite never take part.
    """
    finite = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]

    def beaten(i: int) -> bool:
        x, y = points[i]
        return any(points[j][0] >= x and points[j][1] <= y and tuple(points[j]) != (x, y) for j in finite)

    return sorted((i for i in finite if not beaten(i)), key=lambda i: (*points[i], i))


def perplexity_vs_sparsity(made: list[dict], ink: Ink = LIGHT) -> Figure:
    """A panel per model: a line per policy through (realised sparsity, perplexity), dense as a horizontal line."""
    pruned = [r for r in made if r["policy"] != "dense" and None not in (r["perplexity"], r["sparsity"])]
    dense = [r for r in made if r["policy"] == "dense" and r["perplexity"] is not None]
    drawn = [row for row in made if row in pruned or row in dense]
    models = _distinct("model", drawn)
    figure, axes = panels(max(1, len(models)))
    for model, axis in zip(models, axes[: len(models)], strict=True):
        for policy in _distinct("policy", pruned):
            colour, marker = style(policy)
            points = [row for row in pruned if (row["model"], row["policy"]) == (model, policy)]
            axis.plot(*_line(points), color=colour, linewidth=1.8)
            axis.plot([r["sparsity"] for r in points], [r["perplexity"] for r in points], marker, color=colour)
        for row in (row for row in dense if row["model"] == model):
            axis.axhline(row["perplexity"], color=style("dense")[0], linewidth=1.4, linestyle=(0, (5, 3)), zorder=1.5)
        axis.set_title(short(model), loc="left", fontweight="bold")
        axis.set_xlabel("share of the context dropped")
        axis.xaxis.set_major_formatter("{x:.0%}")
        axis.margins(x=0.08, y=0.1)
        logarithmic(axis, [row["perplexity"] for row in drawn if row["model"] == model])
    axes[0].set_ylabel("held-out perplexity (lower is better)")
    handles = [swatch("dense", color=style("dense")[0], linewidth=1.4, linestyle=(0, (5, 3)))] if dense else []
    handles += [swatch(text(p), color=style(p)[0], marker=style(p)[1]) for p in _distinct("policy", pruned)]
    finish(figure, axes, sparsity_title(made), handles)
    return figure


def sparsity_title(made: list[dict]) -> str:
    """A sentence where every learned trial beats every other rule of its budget; neutral where the data does not."""
    known = [row for row in made if None not in (row["perplexity"], row["sparsity"])]
    fights = [
        (ours["perplexity"], theirs["perplexity"])
        for ours in known
        for theirs in known
        if ours["policy"] == "learned" and theirs["policy"] not in ("learned", "dense")
        if ours["model"] == theirs["model"] and abs(ours["sparsity"] - theirs["sparsity"]) <= SAME_BUDGET
    ]
    if fights and all(ours < theirs for ours, theirs in fights):
        return "At every budget compared, learned dropping keeps perplexity lower than the fixed rules"
    return "Perplexity against the share of the context dropped"


def accuracy_vs_throughput(made: list[dict], ink: Ink = LIGHT) -> Figure:
    """A panel per model: decoding speed against perplexity relative to dense fine-tuning, with the Pareto front.

    Speed is the speed-up over dense decoding in the same process; tokens/s where no trial has one.
    """
    speed = "speed_up" if any(row["speed_up"] is not None for row in made) else "tokens_per_second"
    drawn = [row for row in made if row[speed] is not None and row["vs_dense"] is not None]
    models = _distinct("model", drawn)
    figure, axes = panels(max(1, len(models)))
    fronts = []
    for model, axis in zip(models, axes[: len(models)], strict=True):
        mine = [row for row in drawn if row["model"] == model]
        points = [(row[speed], row["vs_dense"]) for row in mine]
        fronts.append([points[i] for i in pareto_front(points)])
        axis.plot(*zip(*fronts[-1], strict=True), color=ink.text, zorder=1.6, **FRONT)
        axis.axhline(1, color=ink.rule, linewidth=1.2)
        for row, (x, y) in zip(mine, points, strict=True):
            colour, marker = style(row["policy"])
            axis.errorbar(x, y, xerr=_spread(row, speed), color=colour, elinewidth=1, alpha=0.6)
            edge = ink.text if (x, y) in fronts[-1] else ink.paper
            axis.plot(x, y, marker, color=colour, markersize=7.5, markeredgecolor=edge, markeredgewidth=1, zorder=3)
        axis.set_title(short(model), loc="left", fontweight="bold")
        axis.set_xlabel("decoding speed, dense in the same process = 1" if speed == "speed_up" else "tokens per second")
        axis.margins(0.16, 0.14)
        logarithmic(axis, [y for _, y in points])
    axes[0].set_ylabel("perplexity, dense fine-tuning = 1\n(lower is better)")
    handles = [swatch(text(p), color=style(p)[0], marker=style(p)[1], linewidth=0) for p in _distinct("policy", drawn)]
    finish(figure, axes, speed_title(made), handles + [swatch("Pareto front", color=ink.text, **FRONT)] * bool(drawn))
    figure.draw_without_rendering()  # fixes the layout: names are placed in pixels
    for model, axis, front in zip(models, axes[: len(models)], fronts, strict=True):
        mine = [row for row in drawn if row["model"] == model]
        _label(axis, [((row[speed], row["vs_dense"]), _title(row)) for row in mine], front)
    return figure


def speed_title(made: list[dict]) -> str:
    """The fastest trial close to dense perplexity, as a sentence, where it beats dense; else a neutral title."""
    known = [row for row in made if row["policy"] != "dense" and None not in (row["speed_up"], row["vs_dense"])]
    fastest = max((r for r in known if r["vs_dense"] <= 1 + CLOSE), key=lambda row: row["speed_up"], default=None)
    if fastest is None or fastest["speed_up"] < 1.05:
        return "Perplexity against decoding speed"
    who = f"{short(fastest['model'])}, {_title(fastest)}"
    return f"Within {CLOSE:.0%} of dense perplexity, decoding is up to {fastest['speed_up']:.2f}x as fast ({who})"


def has_curves(made: list[dict], curves: dict[str, list[dict]]) -> bool:
    """Is there a training curve of a finished trial to draw?"""
    return any(number(row, "loss") is not None for trial in made for row in curves.get(str(trial["trial"]), []))


def training(made: list[dict], curves: dict[str, list[dict]], ink: Ink = LIGHT) -> Figure:
    """Per model, the training loss of its trials above their sparsity (step function) and its goal."""
    drawn = [row for row in made if str(row["trial"]) in curves]
    models, targets = _distinct("model", drawn), sorted({row["target"] for row in drawn} - {None})
    dashes = {None: "-"} | {target: DASHES[i % len(DASHES)] for i, target in enumerate(targets)}
    figure, axes = panels(len(models), rows=2)
    for model, loss_axis, sparsity_axis in zip(models, axes[: len(models)], axes[len(models) :], strict=True):
        for row in (row for row in drawn if row["model"] == model):
            curve = curves[str(row["trial"])]
            look = {"color": style(row["policy"])[0], "linewidth": 1.4, "linestyle": dashes[row["target"]]}
            loss_axis.plot(*_series(curve, "loss"), **look)
            steps, shares = _series(curve, "sparsity")
            if row["policy"] == "learned" and steps:
                sparsity_axis.plot(*_series(curve, "sparsity_goal"), color=ink.text, linewidth=0.8, alpha=0.45)
                sparsity_axis.plot(steps, shares, **look)
                note = "" if row["target"] is None else f" {row['target']:.0%}"
                sparsity_axis.annotate(note, (steps[-1], shares[-1]), va="center", fontsize=8)
        loss_axis.set_title(short(model), loc="left", fontweight="bold")
        sparsity_axis.set_ylim(0, 1)
        sparsity_axis.yaxis.set_major_formatter("{x:.0%}")
        sparsity_axis.set_xlabel("step")
        sparsity_axis.sharex(loss_axis)
        loss_axis.margins(x=0.1)
    axes[0].set_ylabel("training loss (nats per token)")
    axes[len(models)].set_ylabel("share dropped (thin line: its goal)")
    handles = [swatch(text(p), color=style(p)[0], linewidth=2.5) for p in _distinct("policy", drawn)]
    handles += [swatch(f"target {t:.0%}", color=ink.text, linestyle=dashes[t]) for t in targets]
    finish(figure, axes, "Training loss, and sparsity under the step function against its goal", handles)
    return figure


def _distinct(key: str, made: list[dict]) -> list:
    return list(dict.fromkeys(row[key] for row in made))


def _title(row: dict) -> str:
    known = row["sparsity"] is not None and row["policy"] != "dense"
    return f"{text(row['policy'])} {row['sparsity']:.0%}" if known else text(row["policy"])


def _series(curve: list[dict], key: str) -> tuple[list, list]:
    known = [(row["step"], value) for row in curve if (value := number(row, key)) is not None]
    return [step for step, _ in known], [value for _, value in known]


def _line(points: list[dict]) -> tuple[list, list]:
    """Mean per target, by sparsity: several seeds of one target are points around one line, not a zigzag."""
    groups = defaultdict(list)
    for row in points:
        groups[row["trial"] if row["target"] is None else row["target"]].append((row["sparsity"], row["perplexity"]))
    means = sorted((mean(x for x, _ in group), mean(y for _, y in group)) for group in groups.values())
    return [x for x, _ in means], [y for _, y in means]


def _spread(row: dict, speed: str) -> list[list[float]] | None:
    low, middle, high = (row[f"tokens_per_second{end}"] for end in ("_min", "", "_max"))
    unit = row["tokens_per_second_dense"] if speed == "speed_up" else 1
    if low is None or high is None or not low <= middle <= high:
        return None
    return [[(middle - low) / unit], [(high - middle) / unit]]


def _label(axis: Axes, named: list[tuple[tuple[float, float], str]], front: list[tuple[float, float]]) -> None:
    """Name each point, at the first place around it that is free of points, other names and the front."""
    from matplotlib.transforms import Bbox

    corners = [axis.transData.transform(point) for point in front]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in (axis.transData.transform(at) for at, _ in named)]
    for start, end in pairwise(corners):
        taken += [Bbox.from_bounds(*(start + (end - start) * k / 24) - 1, 2, 2) for k in range(25)]
    places = ((0, 8), (0, -8), (13, 0), (-13, 0), (7, -7), (-7, 7), (7, 7), (-7, -7), (0, 18), (0, -18))
    horizontal, vertical = {-1: "right", 0: "center", 1: "left"}, {-1: "top", 0: "center", 1: "bottom"}
    for at, name in named:
        note = axis.annotate(name, at, xytext=places[0], textcoords="offset points", fontsize=7.5)
        for dx, dy in (*places, places[0]):
            note.xyann = (dx, dy)
            note.set(ha=horizontal[(dx > 0) - (dx < 0)], va=vertical[(dy > 0) - (dy < 0)])
            box = note.get_window_extent()
            inside = axis.bbox.containsx(box.x0) and axis.bbox.containsx(box.x1) and axis.bbox.containsy(box.y0)
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(note.get_window_extent())
