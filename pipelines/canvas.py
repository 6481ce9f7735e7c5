"""How does every plot of the project look? One palette, one frame, one way to bytes, no global state."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.table import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's palette, told apart with any colour vision; markers differ too, for print without colour.
STYLES = {
    "learned": ("#0072B2", "o"),
    "window": ("#E69F00", "s"),
    "strided": ("#009E73", "^"),
    "dense": ("#888888", "D"),
}
OTHER_STYLES = (("#CC79A7", "v"), ("#56B4E9", "P"), ("#D55E00", "X"))


@dataclass(frozen=True)
class Ink:
    """Colours of paper, text and rules."""

    paper: str
    text: str
    rule: str


LIGHT = Ink(paper="#ffffff", text="#1c1e21", rule="#d9dce1")
DARK = Ink(paper="#17191d", text="#e6e7ea", rule="#3a3f47")


def style(policy: object) -> tuple[str, str]:
    """Colour and marker of a policy, the same in every plot and on the page."""
    name = str(policy)
    return STYLES.get(name) or OTHER_STYLES[sum(map(ord, name)) % len(OTHER_STYLES)]


def short(model: object) -> str:
    """A model's name on one line of a plot."""
    name = text(model)
    return name if len(name) <= 40 else name[:39] + "\N{HORIZONTAL ELLIPSIS}"


def render(draw: Callable[[Ink], Figure], ink: Ink, *kinds: str) -> list[bytes]:
    """Draw once and return the bytes of a file of each kind (png, svg); equal data gives equal bytes."""
    import matplotlib

    settings = {
        "text.parse_math": False,  # a model named $x$ is a name, not a formula
        "svg.hashsalt": "ctxprune",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.facecolor": ink.paper,
        "figure.facecolor": ink.paper,
        "axes.grid": True,
        "grid.color": ink.rule,
        "grid.linewidth": 0.6,
        "axes.edgecolor": ink.rule,
        "legend.frameon": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), ink.text),
        **dict.fromkeys(("xtick.color", "ytick.color"), ink.rule),
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = draw(ink)
        return [_saved(figure, kind) for kind in kinds]


def _saved(figure: Figure, kind: str) -> bytes:
    out = io.BytesIO()
    metadata = {"Date": None, "Creator": "ctxprune"} if kind == "svg" else {"Software": "ctxprune"}
    figure.savefig(out, format=kind, dpi=180, metadata=metadata)
    return out.getvalue()


def panels(count: int, *, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, at most three side by side; with `rows` > 1, that many full rows of `count`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide = count if rows > 1 else min(count, 3)
    tall = rows if rows > 1 else math.ceil(count / wide)
    figure = Figure(figsize=(max(6.4, 4.4 * wide), 1.1 + 3.1 * tall), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(tall, wide, squeeze=False).flat)
    for unused in axes[rows * count :]:
        unused.remove()
    return figure, axes[: rows * count]


def logarithmic(axis: Axes, values: list[float]) -> None:
    """One rule that falls apart must not flatten the others: beyond a factor of 3 the scale is logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if min(values) > 0 and max(values) > 3 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def swatch(label: str, **look: object) -> Line2D:
    """One entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **look)


def finish(figure: Figure, axes: list[Axes], title: str, handles: list[Line2D]) -> None:
    """Title and legend; without anything in the legend nothing was drawn, and the panel says so."""
    width = int(figure.get_figwidth() * 11)  # characters of this size on one line
    figure.suptitle("\n".join(textwrap.wrap(title, width)), x=0.01, ha="left", fontsize=11.5)
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=min(len(handles), 8))
    else:
        axes[0].text(0.5, 0.5, "no finished trial has these numbers", transform=axes[0].transAxes, ha="center")
