"""What does a sweep come to, in rows? Results become comparable numbers, shown as a terminal table, Markdown or CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

SAME_BUDGET = 0.02
"""Two trials spend the same budget when their realised sparsities differ by no more than this."""

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Column:
    """One column of the table: the row's key, its title and how a value is written."""

    key: str
    title: str
    show: Callable[[Any], str]
    judged: bool = False
    """Lower is better and the best is marked; not for speeds and bytes, which differ by noise and budget alone."""
    narrow: bool = False
    """Shown on a narrow terminal too."""


def number(record: object, *path: str) -> float | None:
    """The finite number at a path of keys, or None: absent, null, text, NaN and infinity all count as not measured."""
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    if isinstance(record, bool) or not isinstance(record, int | float):
        return None
    return record if math.isfinite(record) else None


def ratio(value: float | None, reference: float | None) -> float | None:
    """`value / reference`, or None where either is unknown or the reference is zero."""
    return value / reference if value is not None and reference else None


def text(value: object) -> str:
    """A name as one printable line: control characters (newlines, terminal escapes) become spaces."""
    shown = "-" if value is None or value == "" else str(value)
    return "".join(character if character.isprintable() else " " for character in shown)


def dense_of(result: dict, results: list[dict]) -> dict | None:
    """The dense trial of the same model, trained and evaluated alike: that of the same seed where there are several."""
    rivals = [r for r in results if r.get("policy") == "dense" and number(r, "perplexity") is not None]
    rivals = [r for r in rivals if all(r.get(key) == result.get(key) for key in ("model", "setting"))]

    def agreement(rival: dict) -> list[bool]:
        return [rival.get(key) == result.get(key) for key in ("seed", "train_tokens")]

    return result if any(r is result for r in rivals) else max(rivals, key=agreement, default=None)


def longest_context(results: Iterable[dict]) -> str | None:
    """The longest context at which any trial was evaluated, as the key it has in `perplexity_at`."""
    keys = {key for result in results if isinstance(at := result.get("perplexity_at"), dict) for key in at}
    return max((key for key in keys if key.isdecimal()), key=int, default=None)


def rows(results: list[dict]) -> list[dict]:
    """One flat row of raw numbers per result, in the same order; what was not measured is None.

    `vs_dense` divides by the perplexity of the same model's dense trial, `speed_up` by the dense speed measured in
    the same process, `cache_ratio` by the dense cache; `soft_gap` is how far perplexity under the step function lies
    above perplexity under the soft gates of training (0.01 = 1 %).
    """
    longest, set_ups = longest_context(results), _set_ups(results)
    made = []
    for result in results:
        perplexity, dense = number(result, "perplexity"), dense_of(result, results)
        soft = ratio(perplexity, number(result, "perplexity_soft"))
        spread = result.get("tokens_per_second_spread")
        low, high = spread if isinstance(spread, list) and len(spread) == 2 else (None, None)
        made.append(
            {
                "trial": result.get("trial"),
                "model": _model(result, set_ups),
                "policy": result.get("policy"),
                "target": number(result, "sparsity_target"),
                "sparsity": number(result, "sparsity"),
                "perplexity": perplexity,
                "vs_dense": ratio(perplexity, number(dense, "perplexity")),
                "soft_gap": None if soft is None else soft - 1,
                "longest_context": None if longest is None else int(longest),
                "perplexity_at_longest": None if longest is None else number(result, "perplexity_at", longest),
                "tokens_per_second": number(result, "tokens_per_second"),
                "tokens_per_second_min": number({"low": low}, "low"),
                "tokens_per_second_max": number({"high": high}, "high"),
                "tokens_per_second_dense": number(result, "tokens_per_second_dense"),
                "speed_up": ratio(number(result, "tokens_per_second"), number(result, "tokens_per_second_dense")),
                "ms_per_token": number(result, "ms_per_token"),
                "cache_bytes": number(result, "cache_bytes"),
                "cache_ratio": ratio(number(result, "cache_bytes"), number(result, "cache_bytes_dense")),
                "train_tokens": number(result, "train_tokens"),
                "seed": number(result, "seed"),
                "set_up": _set_up(result, set_ups),
            }
        )
    return made


def _set_ups(results: list[dict]) -> dict[object, set]:
    """By model, what its trials were trained and evaluated with; see study.setting."""
    found: dict[object, set] = {}
    for result in results:
        found.setdefault(result.get("model"), set()).add(result.get("setting"))
    return found


def _set_up(result: dict, set_ups: dict[object, set]) -> str | None:
    """What tells trials of one model apart that may not be held against each other; None where all of them may."""
    return str(result.get("setting"))[:6] if len(set_ups[result.get("model")]) > 1 else None


def _model(result: dict, set_ups: dict[object, set]) -> str | None:
    """A model's name: of each of its set-ups where there are several, so that whoever compares models is right."""
    apart = _set_up(result, set_ups)
    return result.get("model") if apart is None else f"{text(result.get('model'))}, set-up {apart}"


def human_bytes(count: float) -> str:
    """A number of bytes with a binary unit and three significant digits."""
    power = 0
    while abs(count) >= 1024 and power < len(UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} B" if power == 0 else f"{count:.{max(0, 2 - int(math.log10(abs(count))))}f} {UNITS[power]}"


def decimal(value: float) -> str:
    """A perplexity, a speed or a time: two decimals, none from 1,000 on, three significant digits below 0.1."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"


def columns(made: list[dict]) -> list[Column]:
    """The columns of the table of these rows."""
    longest = next((row["longest_context"] for row in made if row["longest_context"] is not None), None)
    shown = [
        Column("model", "model", text, narrow=True),
        Column("policy", "policy", text, narrow=True),
        Column("target", "target", "{:.0%}".format),
        Column("sparsity", "sparsity", "{:.1%}".format, narrow=True),
        Column("perplexity", "perplexity", decimal, judged=True, narrow=True),
        Column("vs_dense", "vs dense", "{:.3f}x".format, judged=True, narrow=True),
        Column("soft_gap", "soft gap", "{:+.1%}".format),
        Column(
            "perplexity_at_longest", "ppl @ longest" if longest is None else f"ppl @ {longest}", decimal, judged=True
        ),
        Column("tokens_per_second", "tokens/s", decimal, narrow=True),
        Column("speed_up", "speed-up", "{:.2f}x".format, narrow=True),
        Column("ms_per_token", "ms/token", decimal),
        Column("cache_bytes", "cache", human_bytes),
        Column("cache_ratio", "cache ratio", "{:.3f}x".format),
    ]
    names = [(row["model"], row["policy"], row["target"]) for row in made]
    # Seeds or other knobs were swept: without the trial's name rows look alike.
    if len(set(names)) < len(names) or any(row["set_up"] for row in made):
        shown.insert(1, Column("trial", "trial", text))
    return shown


def cell(row: dict, column: Column) -> str:
    """One value as people read it; `-` where nothing was measured."""
    value = row[column.key]
    return "-" if value is None else column.show(value)


def is_best(row: dict, column: Column, made: list[dict]) -> bool:
    """Is this value the lowest of a fair fight: two or more rules, same model, same target, same realised budget?"""
    if not column.judged or row[column.key] is None or row["target"] is None or row["sparsity"] is None:
        return False
    rivals = [r for r in made if (r["model"], r["target"]) == (row["model"], row["target"]) and r["policy"] != "dense"]
    spent = [r["sparsity"] for r in rivals]
    if len({r["policy"] for r in rivals}) < 2 or None in spent or max(spent) - min(spent) > SAME_BUDGET:
        return False
    values = [r[column.key] for r in rivals]
    if None in values or len(set(values)) < 2:
        return False
    return row[column.key] == min(values)


def terminal(made: list[dict], *, narrow: bool = False) -> Table:
    """A rich table, a section per model; `narrow` leaves only the columns that fit 80 characters."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = [column for column in columns(made) if column.narrow or not narrow]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in shown:
        table.add_column(
            column.title, justify="left" if column.show is text else "right", no_wrap=column.show is not text
        )
    for index, row in enumerate(made):
        styles = ["bold green" if is_best(row, column, made) else "" for column in shown]
        # Text, not str: a model named [red] is a name, not markup.
        table.add_row(*[Text(cell(row, column), style=style) for column, style in zip(shown, styles, strict=True)])
        if index + 1 < len(made) and made[index + 1]["model"] != row["model"]:
            table.add_section()
    return table


def escape_markdown(value: object) -> str:
    """Text that a Markdown table shows as it is: one line, pipes and other active characters escaped."""
    return "".join("\\" + character if character in "\\|`*[]<" else character for character in text(value))


def markdown(made: list[dict]) -> str:
    """A Markdown table; the best of each fair fight (see `is_best`) is bold."""
    shown = columns(made)
    lines = [[escape_markdown(column.title) for column in shown]]
    lines.append(["---" if column.show is text else "--:" for column in shown])
    for row in made:
        cells = [(escape_markdown(cell(row, column)), is_best(row, column, made)) for column in shown]
        lines.append([f"**{value}**" if best else value for value, best in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comma_separated(made: list[dict]) -> str:
    """CSV of raw numbers, None left empty; text that a spreadsheet would run as a formula gets an apostrophe."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(made[0]) if made else ["trial"], lineterminator="\n")
    writer.writeheader()
    for row in made:
        writer.writerow({key: _inert(value) for key, value in row.items()})
    return out.getvalue()


def _inert(value: object) -> object:
    return "'" + value if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
