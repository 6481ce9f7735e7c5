"""What may be said of a sweep, and how does a stranger read it? One self-contained HTML page and its Markdown twin."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from string import Template

from pipelines import table
from pipelines.canvas import style
from pipelines.losses import Verdict

HEADLINE_SPARSITY = 0.8
"""The headline quotes the learned trial nearest to this share, so that the data never picks its own best point."""

NAMES = {"window": "a window", "strided": "strided blocks"}

CAPTIONS = {
    "perplexity_vs_sparsity": "Held-out perplexity against the realised share of the context dropped (step function).",
    "accuracy_vs_throughput": "Decoding speed against perplexity relative to dense fine-tuning: right, down is better. "
    "Bars span the slowest and fastest repetition; outlined points lie on the Pareto front.",
    "training": "Training loss, and the sparsity of learned trials against the goal of their schedule.",
}


def headlines(made: list[dict]) -> list[str]:
    """One sentence or two per model that the rows bear out, also where learned dropping loses."""
    return [
        _headline([row for row in made if row["model"] == model]) for model in dict.fromkeys(r["model"] for r in made)
    ]


def _headline(mine: list[dict]) -> str:
    model = table.text(mine[0]["model"])
    known = [r for r in mine if r["policy"] == "learned" and None not in (r["sparsity"], r["perplexity"])]
    if not known:
        return f"{model}: no learned trial has finished."
    ours = min(known, key=lambda row: abs(row["sparsity"] - HEADLINE_SPARSITY))
    start = f"At {ours['sparsity']:.0%} of the context dropped, {model}"
    if ours["vs_dense"] is None:
        return (
            f"{start} has perplexity {table.decimal(ours['perplexity'])}; no dense trial has finished to compare with."
        )
    excess = ours["vs_dense"] - 1
    if excess < 0:
        told = f"{start} has a perplexity {-excess:.1%} below dense fine-tuning"
    elif excess <= 0.05:
        told = f"{start} keeps perplexity within {excess:.1%} of dense fine-tuning"
    else:
        told = f"{start} has a perplexity {excess:.1%} above dense fine-tuning"
    costs = [_cost(rival, ours) for policy in NAMES if (rival := _rival(mine, ours, policy))]
    return f"{told}{'; ' if costs else ''}{', '.join(costs)}.{_speed(ours)}"


def _rival(mine: list[dict], ours: dict, policy: str) -> dict | None:
    """The trial of another rule to compare with: nearest in sparsity among those of the same target or budget."""
    known = [r for r in mine if r["policy"] == policy and None not in (r["sparsity"], r["vs_dense"])]

    def gap(row: dict) -> float:
        return abs(row["sparsity"] - ours["sparsity"])

    fair = [
        r for r in known if gap(r) <= table.SAME_BUDGET or (r["target"] is not None and r["target"] == ours["target"])
    ]
    return min(fair, key=gap, default=None)


def _cost(rival: dict, ours: dict) -> str:
    same = abs(rival["sparsity"] - ours["sparsity"]) <= table.SAME_BUDGET
    budget = "of the same budget" if same else f"at {rival['sparsity']:.0%}"
    excess = rival["vs_dense"] - 1
    verb = "cost" if rival["policy"] == "strided" else "costs"
    told = f"{verb} {excess:.1%}" if excess >= 0 else f"{verb} nothing ({-excess:.1%} below dense)"
    loses = same and rival["perplexity"] < ours["perplexity"]
    return f"{NAMES[rival['policy']]} {budget} {told}{', which is better' if loses else ''}"


def _speed(ours: dict) -> str:
    if ours["speed_up"] is None:
        return ""
    return f" It decodes at {ours['speed_up']:.2f}x the speed of dense in the same process."


def failure_line(failure: dict) -> str:
    """Trial, step, cause and log of a failure on one line."""
    step = "" if failure.get("step") is None else f" at step {table.text(failure['step'])}"
    cause, where = table.text(failure.get("cause") or "unknown cause"), table.text(failure.get("log") or "not kept")
    return f"{table.text(failure.get('trial'))} failed{step}: {cause} (log: {where})"


def absent_line(absent: list[str]) -> str:
    """How many trials of the plan have not run, and the first names."""
    names = ", ".join(table.text(name) for name in absent[:3]) + (", ..." if len(absent) > 3 else "")
    return f"{len(absent)} of the planned trials {'has' if len(absent) == 1 else 'have'} not finished: {names}"


def conditions(results: list[dict]) -> list[str]:
    """The distinct machines, versions and benchmark shapes behind the numbers, each on one line."""
    machine = {"cpu": "{}", "cores": "{} cores", "memory_gb": "{} GB memory", "gpu": "GPU {}", "system": "{}"}
    shape = {"batch": "batch {}", "prompt": "{} prompt tokens", "new_tokens": "{} new tokens", "repeats": "{} repeats"}
    lines = []
    for result in results:
        about = result.get("versions")
        versions = {key: f"{key} {{}}" for key in about} if isinstance(about, dict) else {}
        for title, key, words in (
            ("Machine", "machine", machine),
            ("Versions", "versions", versions),
            ("Decoding", "benchmark", shape),
        ):
            record = result.get(key) if isinstance(result.get(key), dict) else {}
            known = [
                words[name].replace("{}", table.text(record[name])) for name in words if record.get(name) is not None
            ]
            lines.append(f"{title}: {', '.join(known)}" if known else "")
    return [line for line in sorted(set(lines), key=lines.index) if line]


def repeats(made: list[dict]) -> str:
    """How many seeds stand behind a number: with one, small differences mean little."""
    if len({row["seed"] for row in made}) < 2:
        return "Every number comes from one seed: differences of a percent or so between trials may be chance."
    return "Trials differ in their seeds too: rows of the same rule and target show how much chance moves a number."


def markdown(
    name: str, results: list[dict], made: list[dict], failures: list[dict], absent: list[str], verdict: Verdict
) -> str:
    """The table as a Markdown document, with what it takes to read the numbers."""
    told = [table.escape_markdown(line) for line in (*headlines(made), *conditions(results), repeats(made))]
    told.append("Bold: the best of two or more rules with the same model, target and realised sparsity.")
    told += [table.escape_markdown(failure_line(failure)) for failure in failures]
    told += [table.escape_markdown(absent_line(absent))] if absent else []
    lost = [table.escape_markdown(line) for line in (verdict.compared, *verdict.found)]
    listed = "".join(f"- {line}\n" for line in told) + "\n## Where learned pruning does not win\n\n"
    listed += "".join(f"- {line}\n" for line in lost)
    return f"# {table.escape_markdown(name)}\n\n{table.markdown(made)}\n{listed}"


def page(
    name: str,
    results: list[dict],
    made: list[dict],
    failures: list[dict],
    absent: list[str],
    images: dict[str, tuple[bytes, bytes]],
    verdict: Verdict,
    more: str = "",
) -> str:
    """The whole page as a string; `images` maps a plot's name to its SVG on light and on dark paper, `more` is further
    sections as HTML."""
    lines = [failure_line(failure) for failure in failures] + ([absent_line(absent)] if absent else [])
    sections = filled(
        Path(__file__).with_name("sweep.html"),
        table=_table(made),
        compared=escape(verdict.compared),
        losses=f"<ul>{items(verdict.found)}</ul>" if verdict.found else "",
        plots="".join(figure(CAPTIONS[plot], *images[plot]) for plot in images),
        layers=_layers(results),
        conditions=items([*conditions(results), repeats(made)]),
    )
    state = f"{len(results)} of {len(results) + len(failures) + len(absent)} trials finished"
    return frame(name, state, headlines(made), lines, sections + more)


def frame(name: str, state: str, told: list[str], problems: list[str], sections: str) -> str:
    """A page around its sections, which are HTML; the rest is text.

    Nothing is loaded from anywhere, nothing is run, and every piece of data is escaped.
    """
    return filled(
        Path(__file__).with_name("page.html"),
        name=escape(table.text(name)),
        headlines="".join(f"<p>{escape(line)}</p>" for line in told),
        state=escape(state),
        problems=f'<ul class="problems">{items(problems)}</ul>' if problems else "",
        main=sections,
    )


def filled(template: Path, **parts: str) -> str:
    """A template with every placeholder replaced by HTML."""
    return Template(template.read_text(encoding="utf-8")).substitute(parts)


def items(lines: list[str]) -> str:
    """Lines of text as items of a list."""
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


def _swatch(policy: object) -> str:
    return f'<i class="swatch" style="background:{style(policy)[0]}"></i>'


def _table(made: list[dict]) -> str:
    shown = table.columns(made)
    side = {column.key: ' class="name"' if column.show is table.text else "" for column in shown}
    head = "".join(f'<th scope="col"{side[column.key]}>{escape(column.title)}</th>' for column in shown)
    body, last = [], None
    for row in made:
        cells = []
        for column in shown:
            value = escape(table.cell(row, column))
            value = f"<b>{value}</b>" if table.is_best(row, column, made) else value
            swatch = _swatch(row["policy"]) if column.key == "policy" else ""
            cells.append(f"<td{side[column.key]}>{swatch}{value}</td>")
        body.append(f"<tr{'' if row['model'] == last or not body else ' class=first'}>{''.join(cells)}</tr>")
        last = row["model"]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def figure(caption: str, light: bytes, dark: bytes) -> str:
    """A plot as SVG, on light and on dark paper, with its caption."""
    # Images, not inline SVG: matplotlib's ids would clash between plots, and an image can have a dark twin.
    on_light, on_dark = (f"data:image/svg+xml;base64,{base64.b64encode(image).decode()}" for image in (light, dark))
    caption = escape(caption)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{on_dark}">'
        f'<img src="{on_light}" alt="{caption}"></picture><figcaption>{caption}</figcaption></figure>'
    )


def _layers(results: list[dict]) -> str:
    """A strip of bars per trial that drops anything: one bar per layer, full height = everything dropped."""
    strips = []
    for result in results:
        layers = result.get("sparsity_per_layer")
        shares = [table.number({"share": share}, "share") for share in layers] if isinstance(layers, list) else []
        if result.get("policy") == "dense" or not any(shares):
            continue
        told = ", ".join(f"layer {i + 1}: {'-' if s is None else f'{s:.0%}'}" for i, s in enumerate(shares))
        heights = [min(1.0, max(0.0, share or 0.0)) for share in shares]
        colour = style(result.get("policy"))[0]
        bars = "".join(f'<i style="height:{height:.1%};background:{colour}"></i>' for height in heights)
        known = [share for share in shares if share is not None]
        target = table.number(result, "sparsity_target")
        who = " ".join(
            [table.text(result.get("model")), table.text(result.get("policy"))]
            + [f"{target:.0%}"] * (target is not None)
        )
        strips.append(
            f'<li><span class="who">{escape(who)}</span>'
            f'<span class="bars" role="img" aria-label="{escape(told)}" title="{escape(told)}">{bars}</span>'
            f'<span class="range">{min(known):.0%} to {max(known):.0%}</span></li>'
        )
    return f'<ul class="layers">{"".join(strips)}</ul>' if strips else "<p>No trial recorded its layers.</p>"
