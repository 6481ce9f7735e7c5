"""Where does learning not win a study of policies? A plain sentence for every place that its rows show."""

from __future__ import annotations

from itertools import groupby

from pipelines.policy_study.table import LEARNED, better, differences, missed


def losers(made: list[dict]) -> list[str]:
    """made: rows of table.rows. What learned and does not beat the best that did not, what learned and is slower than
    dense, and all budgets that were missed. Methods that have seen the questions stand aside."""
    found = []
    for _, group in groupby(made, lambda row: (row["task"], row["share"])):
        fair = [row for row in group if not row["aware"]]
        learned = [row for row in fair if row["decides"] in LEARNED]
        others = [row for row in fair if row["decides"] not in LEARNED]
        if others:
            best = max(others, key=lambda row: row["right"])
            found += [_beaten(row, best) for row in learned if not better(row, best)]
        found += [
            _slow(row) for row in learned if any(_over(row[name]) for name in ("read_of_dense", "token_of_dense"))
        ]
    return found + [_off(row) for row in made if missed(row)]


def compared(made: list[dict]) -> str:
    """What the sentences were looked for in, in one or two sentences."""
    learned = [row for row in made if row["decides"] in LEARNED and not row["aware"]]
    timed = sum(row["token_of_dense"] is not None for row in learned)
    told = f"{len(learned)} learned and {len(made) - len(learned)} other results were compared"
    told += f", over at least {min(row['seeds'] for row in made)} seeds; of the learned ones {timed} were timed."
    return told if losers(made) else f"{told} Learning lost none of these comparisons."


def _where(row: dict) -> str:
    return f"{row['task']} at {row['share']:g}: {row['method']}"


def _told(row: dict) -> str:
    spread = f", {row['lowest']:.3f} to {row['highest']:.3f} in {row['seeds']} seeds" if row["seeds"] > 1 else ""
    return f"({row['right']:.3f}{spread})"


def _beaten(row: dict, best: dict) -> str:
    start = (
        f"{_where(row)} {_told(row)} does not beat {best['method']} {_told(best)}, the best whose choice is not learned"
    )
    if row["seeds"] == 1:
        return f"{start}."
    found = differences(row, best)
    if better(best, row):
        said = "it answers less with every seed"
    elif not found:
        said = "their models differ, and their ranges overlap"
    elif min(found) < 0:
        said = "some seeds answer less"
    else:
        said = f"{'some seeds answer' if max(found) > 0 else 'every seed answers'} as much"
    return f"{start}: {said}."


def _over(times: float | None) -> bool:
    return times is not None and times > 1


def _slow(row: dict) -> str:
    parts = (("read_of_dense", "reads the context"), ("token_of_dense", "decodes a token"))
    told = [f"{verb} in {row[name]:.2f}x the time of dense" for name, verb in parts if _over(row[name])]
    return f"{_where(row)} {' and '.join(told)}."


def _off(row: dict) -> str:
    off = row["cache_worst"] / row["share"] - 1
    way, one = "more" if off > 0 else "fewer", " with one seed" if row["seeds"] > 1 else ""
    kept = f"it kept {row['cache_worst']:.3f} of the bytes{one}, {abs(off):.1%} {way} than asked"
    return f"{_where(row)} missed its budget: {kept}."
