"""Which trials does a sweep hold? Each line of sweep.trials is a product; the command line has the last word."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from dataclasses import dataclass
from typing import Any

from ctxprune.errors import UserError
from pipelines import checks
from pipelines.compose import build, config_hash, one_line, parse, values
from pipelines.config import Config

# A sweep above this is a slip of the keyboard: at a minute a trial it is most of a day.
MAX_TRIALS = 1000
# Settings of the sweep as a whole: a trial cannot have its own.
WHOLE = {"sweep", "tracking", "runs", "format", "experiment", "cluster"}
# What a trial's result depends on: where its records lie, or how they are shown, changes nothing.
DEFINES = ("model", "data", "pruning", "policy", "train", "engine", "evaluate", "benchmark")


@dataclass
class Trial:
    """One point of a sweep."""

    name: str
    """Folder of the trial: model, policy, sparsity or weight, and 8 hex digits of what defines its result."""
    config: Config
    """Resolved and checked."""
    overrides: list[str]
    """What `train` needs on its command line to run this trial alone (with the experiment of the sweep)."""


def expand(config: Config, overrides: list[str]) -> list[Trial]:
    """The trials of a sweep, in the order of its lines, equal ones merged.

    config is the frame composed for `sweep`, overrides the words typed by the person. A typed setting
    replaces the same setting in every line that has it; any other holds for all trials, and a list multiplies them.
    Raises UserError naming the trial that makes no sense.
    """
    typed = {}
    for word in overrides:
        item = parse(word)
        typed[item.key_or_group] = _choices(item)
    lines = [_read_line(line) for line in config.sweep.trials] or [{}]
    in_lines = set().union(*lines)
    for_all = {key: choices for key, choices in typed.items() if key not in in_lines}
    points: dict[tuple[str, ...], None] = {}
    for line in lines:
        axes = for_all | {key: typed.get(key, choices) for key, choices in line.items()}
        for point in itertools.product(*axes.values()):
            points[point] = None
            if len(points) > MAX_TRIALS:
                raise UserError(f"the sweep has more than {MAX_TRIALS} trials: list fewer values")
    trials: dict[str, Trial] = {}
    for point in points:
        trial = _trial(list(point))
        trials.setdefault(trial.name, trial)
    return list(trials.values())


def trial_hash(config: Config) -> str:
    """16 hex digits of what defines a trial's result; equal configs on different machines get the same."""
    parts: dict[str, Any] = {name: dataclasses.asdict(getattr(config, name)) for name in DEFINES}
    return config_hash(parts | {"workers": config.cluster.workers})


def trial_name(config: Config) -> str:
    """Readable and unique: tiny-learned-0.8-1f2e3d4c, gpt2-learned-g0.15-..., tiny-dense-..."""
    parts = [config.model.name, config.pruning.policy]
    if config.pruning.sparsity is not None:
        parts.append(f"{config.pruning.sparsity:g}")
    if config.pruning.gamma is not None:
        parts.append(f"g{config.pruning.gamma:g}")
    return "-".join([*parts, trial_hash(config)[:8]])


def _read_line(line: str) -> dict[str, list[str]]:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UserError(f"sweep.trials holds {one_line(line)!r}: {error}; close the quotation") from None
    found = {}
    for word in words:
        item = parse(word)
        if item.key_or_group.split(".")[0] in WHOLE:
            raise UserError(
                f"sweep.trials holds {one_line(word)!r}: that belongs to the whole sweep; give it beside the lines"
            )
        found[item.key_or_group] = _choices(item)
    return found


def _choices(item: Any) -> list[str]:
    choices = values(item, MAX_TRIALS)
    if len(choices) > 1 and item.key_or_group.split(".")[0] in WHOLE:
        raise UserError(f"{one_line(item.input_line)}: a sweep has one {item.key_or_group}; give one value")
    return choices


def _trial(overrides: list[str]) -> Trial:
    try:
        config = build("sweep", overrides)
        checks.check(config)
    except UserError as error:
        raise UserError(f"trial {' '.join(overrides)!r}: {error}") from None
    return Trial(trial_name(config), config, overrides)
