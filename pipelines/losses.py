"""Where does learned pruning not win? Every place the rows of a sweep show, one plain sentence each, none by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean

from pipelines.table import SAME_BUDGET, decimal, number, ratio, text

MISSED = 0.005
"""A target is missed when the realised sparsity is off by more than this share of the context."""
EQUAL = 0.005
"""Perplexities that differ by no more than this part are equal quality when caches are compared; where both rules have
several seeds, overlapping seeds are equal too."""
QUESTIONS = {
    "perplexity": "perplexity against another rule of the same budget",
    "decoding": "decoding against dense",
    "training": "training against dense",
    "target": "the target sparsity",
    "cache": "the cache against another rule of equal quality",
}


@dataclass(frozen=True)
class Verdict:
    """compared: what could be compared, in two sentences; found: a sentence per place where learning does not win."""

    compared: str
    found: list[str]


@dataclass(frozen=True)
class Arm:
    """The trials of one model, rule and target, which differ in their seeds alone."""

    rows: list[dict]

    @property
    def seeds(self) -> int:
        return len(self.rows)

    def values(self, key: str) -> list[float]:
        return [row[key] for row in self.rows if row[key] is not None]

    def mean(self, key: str) -> float | None:
        known = self.values(key)
        return mean(known) if known else None

    def apart(self, other: Arm, key: str) -> bool:
        """Does every seed of this one lie below every seed of the other?"""
        return max(self.values(key)) < min(other.values(key))

    def place(self) -> str:
        """Model, and target or where there is none sparsity, as sentences begin."""
        share = self.rows[0]["target"] if self.rows[0]["target"] is not None else self.mean("sparsity")
        return text(self.rows[0]["model"]) + ("" if share is None else f" at {share:.1%}".replace(".0%", "%"))

    def told(self) -> str:
        """Rule, sparsity and perplexity with what stands behind them."""
        known = self.values("perplexity")
        spread = f", {decimal(min(known))} to {decimal(max(known))} in {len(known)} seeds" if len(known) > 1 else ""
        said = f"{text(self.rows[0]['policy'])} (perplexity {decimal(mean(known))}{spread}"
        sparsity = self.mean("sparsity")
        return said + (")" if sparsity is None else f", {sparsity:.1%} dropped)")


def verdict(made: list[dict], curves: dict[str, list[dict]]) -> Verdict:
    """made: rows of table.rows; curves: training rows by trial, the last of which says the speed of training."""
    every = arms(
        [
            # A perplexity of 0 is none.
            row | {"perplexity": row["perplexity"] or None, "train_speed": _training_speed(curves, row["trial"])}
            for row in made
        ]
    )
    learned = [arm for arm in every if arm.rows[0]["policy"] == "learned"]
    asked: dict[str, int] = dict.fromkeys(QUESTIONS, 0)
    found = []
    for ours in learned:
        mine = [arm for arm in every if arm.rows[0]["model"] == ours.rows[0]["model"]]
        for question, sentence in _judged(ours, mine):
            asked[question] += 1
            found += [sentence] if sentence else []
    return Verdict(_compared(len(learned), asked, bool(found)), found)


def arms(made: list[dict]) -> list[Arm]:
    """Trials that differ in their seeds alone, together; where a seed comes twice something else was swept, and each
    trial stands for itself."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in made:
        own = row["trial"] if row["target"] is None else None  # a fixed sparsity weight has no target to share
        groups[row["model"], row["policy"], row["target"], own].append(row)
    found = []
    for rows in groups.values():
        seeds = [row["seed"] for row in rows]
        found += [Arm(rows)] if len(set(seeds)) == len(seeds) else [Arm([row]) for row in rows]
    return found


def _judged(ours: Arm, mine: list[Arm]) -> Iterator[tuple[str, str | None]]:
    """(question, what was lost or None) for each question that the numbers allow."""
    dense = [arm for arm in mine if arm.rows[0]["policy"] == "dense"]
    rivals = [arm for arm in mine if arm.rows[0]["policy"] not in ("dense", "learned") and arm.values("perplexity")]
    sparsity, target = ours.mean("sparsity"), ours.rows[0]["target"]
    if ours.values("perplexity"):
        near = [arm for arm in rivals if _same_budget(arm.mean("sparsity"), sparsity)]
        if near:
            best = min(near, key=lambda arm: arm.mean("perplexity") or 0.0)
            yield "perplexity", _perplexity(ours, best)
        equal = [arm for arm in rivals if arm.values("cache_ratio") and _equal(ours, arm)]
        if equal and ours.values("cache_ratio"):
            yield "cache", _cache(ours, min(equal, key=lambda arm: arm.mean("cache_ratio") or 0.0))
    if ours.values("speed_up"):
        yield "decoding", _decoding(ours)
    speeds = [value for arm in dense for value in arm.values("train_speed")]
    if speeds and ours.values("train_speed"):
        yield "training", _training(ours, mean(speeds))
    if sparsity is not None and target is not None:
        yield "target", _target(ours, sparsity, target)


def _same_budget(theirs: float | None, ours: float | None) -> bool:
    return theirs is not None and ours is not None and abs(theirs - ours) <= SAME_BUDGET


def _perplexity(ours: Arm, best: Arm) -> str | None:
    if ours.apart(best, "perplexity"):
        return None
    excess = mean(ours.values("perplexity")) / mean(best.values("perplexity")) - 1
    start = f"{ours.place()}: {ours.told()} is"
    beside = f"{best.told()}, the best other rule of that budget"
    if best.apart(ours, "perplexity"):
        seeds = " in every seed" if min(ours.seeds, best.seeds) > 1 else ""
        return f"{start} {excess:.1%} worse than {beside}{seeds}."
    if excess == 0:
        return f"{start} no better than {beside}."
    way = "worse" if excess > 0 else "better"
    return f"{start} {abs(excess):.1%} {way} than {beside}, and the seeds overlap: no difference is shown."


def _equal(ours: Arm, theirs: Arm) -> bool:
    """Is the other's perplexity no more than EQUAL above ours, or within the noise of the seeds?"""
    if mean(theirs.values("perplexity")) <= mean(ours.values("perplexity")) * (1 + EQUAL):
        return True
    return min(ours.seeds, theirs.seeds) > 1 and not ours.apart(theirs, "perplexity")


def _cache(ours: Arm, least: Arm) -> str | None:
    mine, its = mean(ours.values("cache_ratio")), mean(least.values("cache_ratio"))
    if mine <= its:
        return None
    held = f"{ours.place()}: {ours.told()} holds {mine:.3f} of the dense cache"
    return f"{held}, {least.told()} holds {its:.3f} at equal or better quality."


def _decoding(ours: Arm) -> str | None:
    speed = mean(ours.values("speed_up"))
    slowest = min(
        ratio(row["tokens_per_second_min"] or row["tokens_per_second"], row["tokens_per_second_dense"]) or 0.0
        for row in ours.rows
        if row["speed_up"] is not None
    )
    if min(speed, slowest) > 1:
        return None
    start = f"{ours.place()}: learned decodes at {speed:.2f}x the speed of dense in the same process"
    return f"{start}." if speed <= 1 else f"{start}, but its slowest repetition at {slowest:.2f}x."


def _training(ours: Arm, dense: float) -> str | None:
    speed = mean(ours.values("train_speed"))
    if speed >= dense:
        return None
    rates = f"{decimal(speed)} against {decimal(dense)} tokens/s"
    return f"{ours.place()}: learned trains at {speed / dense:.2f}x the speed of dense ({rates})."


def _target(ours: Arm, sparsity: float, target: float) -> str | None:
    # A mean may hit what every seed misses, to either side.
    off = max((value - target for value in ours.values("sparsity")), key=abs)
    if abs(off) <= MISSED:
        return None
    way = "more" if off > 0 else "less"
    where = f"{sparsity:.1%} dropped" if ours.seeds == 1 else f"the worst of {ours.seeds} seeds dropped"
    return f"{ours.place()}: learned misses its target, {where}: {100 * abs(off):.1f} points {way} than asked."


def _training_speed(curves: dict[str, list[dict]], trial: object) -> float | None:
    """Tokens per second from the first step to the last one logged."""
    rows = curves.get(str(trial), [])
    speeds = [speed for row in rows if (speed := number(row, "tokens_per_second")) is not None]
    return speeds[-1] if speeds else None


def _compared(learned: int, asked: dict[str, int], any_found: bool) -> str:
    if not learned:
        return "No learned trial has finished: nothing was compared."
    counts = "; ".join(f"{QUESTIONS[question]} for {count}" for question, count in asked.items())
    lost = "" if any_found or not any(asked.values()) else " Learned pruning lost none of these comparisons."
    limits = (
        f"Budgets within {100 * SAME_BUDGET:g} points of sparsity are the same, targets are met within "
        f"{100 * MISSED:g} points, and qualities are equal within {EQUAL:.1%} of perplexity or where seeds overlap. "
        "Training speeds are as logged, of trials that may have run side by side."
    )
    told = (
        f"{learned} learned setting{'s' if learned > 1 else ''} compared: {counts}. What was not compared was not won."
    )
    return f"{told} {limits}{lost}"
