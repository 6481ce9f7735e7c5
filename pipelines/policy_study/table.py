"""Which method kept most answers, at which cost? One row per method and budget, over all seeds."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from statistics import mean

LEARNED = ("taught", "reward", "fine-tuned")
"""Where a decision is learned on the task; the others decide without."""
CONSTANT = "H2O, best constant"
"""The same number of keys for every input, spread over depth as well as it can be."""
CLOCK = ("attention_ms", "attention_ms_predicted", "attention_ms_dense")
MEANS = ("right", "kept", "cache", "agreement", "precision", "recall", "kept_and_difficulty", "taught_in")
MEANS += ("foreseen_right",)
ENDS = ("low", "high")
"""Of the interval around the difference to dense."""
CLOSE = 0.01
"""Shares of bytes that differ by less, as a part of the budget, are equal budgets."""

COLUMNS: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    ("method", "<28", lambda row: row["method"]),
    ("decides", "<10", lambda row: row["decides"]),
    ("right", ">6", lambda row: f"{row['right']:.3f}"),
    ("seeds", ">13", lambda row: _seeds(row)),
    ("against dense", ">16", lambda row: _against(row)),
    ("kept", ">6", lambda row: f"{row['kept']:.3f}"),
    ("as dense", ">8", lambda row: _number(row["agreement"])),
    ("precision", ">9", lambda row: _number(row["precision"], 2)),
    ("recall", ">6", lambda row: _number(row["recall"], 2)),
    ("r(kept, difficulty)", ">19", lambda row: _number(row["kept_and_difficulty"], 2)),
    ("cache", ">6", lambda row: f"{row['cache']:.3f}"),
    ("reading", ">7", lambda row: _times(row["read_of_dense"])),
    ("token", ">6", lambda row: _times(row["token_of_dense"])),
    ("deciding", ">8", lambda row: "" if row["deciding_ms"] is None else f"{row['deciding_ms']:.1f} ms"),
    ("even from", ">9", lambda row: _tokens(row, "even_from")),
    ("repaid", ">6", lambda row: _tokens(row, "repaid")),
    ("taught in", ">9", lambda row: "" if (row["taught_in"] or 0.0) < 0.5 else f"{row['taught_in']:.0f} s"),
)
NOTES = (
    "right: share of a context's questions that are answered, mean over contexts, then over seeds (lowest to highest); "
    "against dense: that less what is right with everything kept, 95 % interval by a paired bootstrap over contexts, "
    "lowest and highest end of any seed's; kept: share of a context's keys alive when the questions begin, mean over "
    "layers and contexts; as dense: answers that are the dense model's; precision and recall of the kept tokens "
    "against those that are needed; r: correlation of kept with difficulty, where the budget follows the input; cache: "
    "bytes of what is kept over those of dense, interaction keys counted, mean over contexts: the budget; reading, "
    "token: time to read the contexts and per later token over those of dense, 16 rows, deciding included and beside "
    "it (of gates it cannot be told apart); even from: tokens of context from which on a later token took no longer "
    "than dense (up to 2,048, 4 rows, at the smallest share); repaid: later tokens after which reading 2,048 and "
    "writing these took no longer than dense; taught in: wall clock of what is learned or searched for before the "
    "budget is set, mean over seeds. Thresholds are set on validation rows; where the share that these keep of the "
    "measured rows is off by more than 1 % of it, they are set again on these, without their answers, so that bytes "
    "are equal. Small models learn answers alone: what else follows, as gradients ask where the question is not known, "
    "means little. DMS learns from the dense model's answers, gates and what is fine-tuned beside them from the right "
    "ones; the gates' rank was chosen among 4, 8 and 16 on measured rows of recall (4 answers as much), their recipe "
    "on recall in some thirty trainings, more than any other way had. dense, fine-tuned: as many lessons as the window "
    "and H2O had. agent, equal shares: what the agent's scores are worth where every input keeps as much. The oracle "
    "knows what is needed and gives every input as much, which may be less than it needs: no upper bound. The bandit "
    "keeps what the mean of its budgets' last keys would, weighted by its preferences: none that it was rewarded for "
    "alone. strided keys, BigBird blocks: what such a pattern shows to the first question, the rest freed, which the "
    "papers do not. truncation: the rest is cut off before reading. Attention scores (H2O, TOVA, SnapKV and its kin) "
    "drop once, where the context ends, the same keys for all heads of a layer (Ada-KV: by KV head, as DMS), and "
    "protect START and the last token only; LTP drops keys and values, not tokens, and its model is not fine-tuned, as "
    "the published one is (800 steps under its hard thresholds lost answers). Time is of the first seed's model; where "
    "a threshold or a spread over depth was found, of the same share in every row and layer, but for gates and DMS, "
    "which keep what their thresholds keep there. Methods marked * have seen the questions when they decide."
)


def rows(records: list[dict]) -> list[dict]:
    """Means over seeds, one row per (task, share, method), in the order of the records."""

    def key(record: dict) -> tuple:
        return record["task"], record["share"], record["method"]

    seeds: dict[str, set[int]] = {}
    for record in records:
        seeds.setdefault(record["task"], set()).add(record["seed"])
    found = []
    for (task, share, method), group in groupby(records, key):
        several = list(group)
        row = {"task": task, "share": share, "method": method + ("*" if several[0]["aware"] else "")}
        row |= {name: several[0][name] for name in ("decides", "aware", "adaptive")}
        row |= {"seeds": len(several), "of_seeds": len(seeds[task]), "lowest": min(r["right"] for r in several)}
        row |= {"highest": max(r["right"] for r in several)}
        row["by_seed"] = {r["seed"]: (r["right"], r.get("model"), _dense(r)) for r in several}
        bounds = [
            [r[f"against_dense_{end}"] for r in several if r.get(f"against_dense_{end}") is not None] for end in ENDS
        ]
        row["against"] = (min(bounds[0]), max(bounds[1])) if all(bounds) else None
        row["cache_worst"] = _farthest([r["cache"] for r in several], share)
        row["foreseen"] = _farthest([r["foreseen"] for r in several if r.get("foreseen") is not None], share)
        for name in (*MEANS, *CLOCK):
            row[name] = _mean([r.get(name) for r in several])
        for name in ("read_of_dense", "token_of_dense", "deciding_ms"):
            row[name] = several[0].get(name)
        row |= {name: several[0][name] for name in ("even_from", "repaid") if name in several[0]}
        found.append(row)
    return found


def _dense(record: dict) -> float | None:
    """What the model answers with everything kept: tells models apart that another machine trained from one seed."""
    against = record.get("against_dense")
    return None if against is None else record["right"] - against


def everything(records: list[dict], task: str) -> list[str]:
    """A sentence on what the task's models answer with everything kept; none where the points do not say."""
    found = {record["seed"]: _dense(record) for record in records if record["task"] == task}
    known = [right for right in found.values() if right is not None]
    span = f" ({min(known):.3f} to {max(known):.3f})" if len(known) > 1 else ""
    return [f"With everything kept {mean(known):.3f}{span} is right."] if known else []


def _seeds(row: dict) -> str:
    few = f" ({row['seeds']} of {row['of_seeds']} seeds)" if row["seeds"] < row["of_seeds"] else ""
    return f"{row['lowest']:.3f} to {row['highest']:.3f}{few}"


def _against(row: dict) -> str:
    return "" if row["against"] is None else "{:+.3f} to {:+.3f}".format(*row["against"])


def verdicts(made: list[dict]) -> list[str]:
    """A line per task and share: the best learned way, the best that is not, and whether their seeds are apart."""
    lines = []
    for (task, share), group in groupby(made, lambda row: (row["task"], row["share"])):
        fair = [row for row in group if not row["aware"]]
        learned = [row for row in fair if row["decides"] in LEARNED]
        others = [row for row in fair if row["decides"] not in LEARNED]
        if not learned or not others:
            continue
        best, rival = (max(side, key=lambda row: row["right"]) for side in (learned, others))
        if 1 in (best["seeds"], rival["seeds"]):
            said = "learning does NOT win" if rival["right"] > best["right"] else "one seed says little"
        elif best["lowest"] > rival["highest"]:
            said = "every seed of the first above every seed of the second"
        elif rival["lowest"] > best["highest"]:
            said = "learning does NOT win: every seed of the second is above"
        elif better(best, rival):
            said = "the first is better on every seed's model, though their ranges overlap"
        elif better(rival, best):
            said = "learning does NOT win: the second is better on every seed's model"
        else:
            said = "their seeds overlap"
        lines.append(
            f"{task} at {share:g}: learned best is {best['method']} ({best['right']:.3f}), "
            f"best whose choice is not learned {rival['method']} ({rival['right']:.3f}); {said}{_budgets(best, rival)}"
        )
    return lines


def differences(row: dict, rival: dict) -> list[float]:
    """By how much more the first answers, seed by seed: the same model and the same questions; none where a seed that
    both have is of two models."""
    mine, theirs = row["by_seed"], rival["by_seed"]
    pairs = [(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]
    return [one[0] - other[0] for one, other in pairs] if all(_same_model(*pair) for pair in pairs) else []


def _same_model(one: tuple, other: tuple) -> bool:
    """By a digest of the weights, else by what they answer with everything kept, up to rounding: another answer of
    2,048 contexts of 8 moves it by 6e-5. Points of before that was written say nothing, and count as the same."""
    if None not in (one[1], other[1]):
        return one[1] == other[1]
    return None in (one[2], other[2]) or abs(one[2] - other[2]) < 1e-5


def better(row: dict, rival: dict) -> bool:
    """Does the first answer more on every seed's model? Where they share no model, its least more than the most."""
    found = differences(row, rival)
    return min(found) > 0 if found else row["lowest"] > rival["highest"]


def missed(row: dict) -> bool:
    """Is the budget of one of this row's seeds not what was asked for, by more than CLOSE of it?"""
    return abs(row["cache_worst"] / row["share"] - 1) > CLOSE


def _budgets(*several: dict) -> str:
    """Whose budget was missed, of rows that are compared."""
    names = [row["method"] for row in several if missed(row)]
    return f" (not at its budget: {', '.join(names)})" if names else ""


def against_constant(made: list[dict]) -> list[str]:
    """A line per task, share and way that is taught by reward: does it beat the best constant?"""
    lines = []
    for (task, share), group in groupby(made, lambda row: (row["task"], row["share"])):
        several = list(group)
        for rival in (row for row in several if row["method"] == CONSTANT):
            for row in (one for one in several if one["decides"] == "reward"):
                if not differences(row, rival):
                    continue  # no seed has both
                if better(row, rival):
                    said = "beats the best constant"
                elif better(rival, row):
                    said = "is BELOW the best constant"
                else:
                    said = "equals the best constant within their seeds"
                found = differences(row, rival)
                lines.append(
                    f"{task} at {share:g}: {row['method']} {said}: {row['lowest']:.3f} to {row['highest']:.3f} against "
                    f"{rival['lowest']:.3f} to {rival['highest']:.3f}; seed by seed {min(found):+.3f} to "
                    f"{max(found):+.3f} ({len(found)} seeds){_budgets(row, rival)}"
                )
    return lines


def clocked(made: list[dict]) -> list[str]:
    """A line per way whose reward is measured time: what its table predicted, and what the clock says of what it
    keeps."""
    return [
        f"{row['task']} at {row['share']:g}: {row['method']}: attention of a token takes {row['attention_ms']:.3f} ms, "
        f"predicted {row['attention_ms_predicted']:.3f} ms; {row['attention_ms_dense']:.3f} ms over all keys"
        for row in made
        if row["attention_ms"] is not None
    ]


def unfair(made: list[dict]) -> list[str]:
    """Rows of which a seed's budget is not what was asked for, more than CLOSE of it: the seed that is farthest off."""
    return [
        f"{row['task']} at {row['share']:g}: {row['method']} kept {row['cache_worst']:.3f}"
        + (f" with one seed, {row['cache']:.3f} in the mean" if row["seeds"] > 1 else "")
        for row in made
        if missed(row)
    ]


def unforeseen(made: list[dict]) -> list[str]:
    """Rows of which a seed's thresholds, as validation rows had set them, kept more or less of the measured rows than
    was asked for, by more than CLOSE of it: the seed that was farthest off."""
    return [
        f"{row['task']} at {row['share']:g}: {row['method']} would have kept {row['foreseen']:.3f}"
        + (f", and answered {row['foreseen_right']:.3f} in the mean" if row["foreseen_right"] is not None else "")
        for row in made
        if row["foreseen"] is not None and abs(row["foreseen"] / row["share"] - 1) > CLOSE
    ]


def text(records: list[dict]) -> str:
    """For a terminal."""
    made, lines = rows(records), []
    for (task, share), group in groupby(made, lambda row: (row["task"], row["share"])):
        lines += ["", f"{task}, {share:.3g} of the context's bytes stay", *everything(records, task)]
        lines.append("  ".join(f"{name:{form}}" for name, form, _ in COLUMNS))
        lines += ["  ".join(f"{say(row):{form}}" for _, form, say in COLUMNS) for row in group]
    said = [*verdicts(made), *against_constant(made), *clocked(made)]
    said += [*(f"budget missed: {line}" for line in unfair(made)), *(f"set again: {line}" for line in unforeseen(made))]
    return "\n".join([*lines, "", *said, "", NOTES])


def markdown(records: list[dict]) -> str:
    """The same for a page."""
    made, lines = rows(records), ["# Ways to prune at equal budgets", ""]
    for (task, share), group in groupby(made, lambda row: (row["task"], row["share"])):
        lines += [f"## {task}, {share:.3g} of the context's bytes stay", ""]
        lines += [line for said in everything(records, task) for line in (said, "")]
        lines.append("| " + " | ".join(name for name, _, _ in COLUMNS) + " |")
        lines.append("|" + "|".join("--:" if form.startswith(">") else "--" for _, form, _ in COLUMNS) + "|")
        lines += ["| " + " | ".join(say(row).replace("*", "\\*") for _, _, say in COLUMNS) + " |" for row in group]
        lines.append("")
    lines += ["## Who wins, and where learning does not", "", *(f"- {line}" for line in verdicts(made)), ""]
    for title, said in (("What reward learns beside a constant", against_constant), ("Time as the price", clocked)):
        if found := said(made):
            lines += [f"## {title}", "", *(f"- {line}" for line in found), ""]
    lines += ["Budgets that were missed by more than 1 %:", ""]
    lines += [*(f"- {line}" for line in unfair(made) or ["none"]), ""]
    if again := unforeseen(made):
        lines += ["Thresholds that were set again, on the measured texts without their answers:", ""]
        lines += [*(f"- {line}" for line in again), ""]
    lines += [NOTES.replace("*", "\\*"), ""]
    return "\n".join(lines)


def _farthest(values: list[float], share: float) -> float | None:
    return max(values, key=lambda value: abs(value - share), default=None)


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return mean(there) if there else None


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _tokens(row: dict, name: str) -> str:
    """Nothing where nothing was measured, none where there is no such number."""
    if name not in row:
        return ""
    return "none" if row[name] is None else f"{row[name]:,.0f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
