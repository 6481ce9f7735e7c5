"""Which values make sense? Each lies in its range (ranges.py), and what must agree is compared before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ctxprune.errors import UserError
from pipelines.config import Config
from pipelines.ranges import RANGES, RANKED, TAUGHT, WORDS

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
HUB_DATA = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
# Device names that Windows will not take as a folder, whatever the extension.
RESERVED = {"con", "prn", "aux", "nul"}


def check(config: Config, *, trial: bool = True) -> None:
    """Raise UserError for the first value that makes no sense.

    trial=False is for the frame of a sweep: each value is checked, but what only a whole trial can
    satisfy (learned pruning has a target, a model has a path) is left to the trials.
    """
    for name, value in leaves(config):
        _check_value(name, value)
    _check_names(config)
    _check_model(config, trial)
    _check_schedule(config)
    _check_engine(config)
    _check_gradients(config)
    _check_kernels(config)
    _check_generation(config)
    _check_hidden(config)
    _check_generate(config)
    if trial:
        check_data(config)
        _check_pruning(config)
        _check_contexts(config)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field below a dataclass."""
    for one in fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{one.name}.")
        else:
            yield prefix + one.name, value


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{name} holds bytes that are not UTF-8: give it as UTF-8 text")
    for word in value if isinstance(value, list) else [value]:
        if name in WORDS and word not in WORDS[name]:
            taught = name == "pruning.policy" and word in TAUGHT
            why = " is trained on a task, by `sweep experiment=policies` alone" if taught else ""
            raise UserError(f"{name}={word}{why}: choose one of {', '.join(WORDS[name])}")
    if name in RANGES:
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not _inside(number, RANGES[name]):
                kind = "a number" if isinstance(number, float) else "a whole number"
                raise UserError(f"{name}={number}: give {kind} in {RANGES[name]}")


def _inside(number: float, interval: str) -> bool:
    # int() keeps a 64-bit end exact, which float() would round up.
    low, high = (float(end) if "." in end else int(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    return math.isfinite(number) and above and below


def _check_names(config: Config) -> None:
    for field, name in (("sweep.name", config.sweep.name), ("model.name", config.model.name)):
        if not NAME.fullmatch(name) or name.split(".")[0] in RESERVED:
            raise UserError(f"{field}={name!r}: use 1 to 64 of a-z 0-9 . _ - beginning with a letter or digit")
    if not PROJECT.fullmatch(config.tracking.project):
        wanted = "letters, digits and . _ - beginning with a letter or digit"
        raise UserError(f"tracking.project={config.tracking.project!r}: use {wanted}")
    if not config.runs.strip():
        raise UserError("runs is empty: give the folder that holds the sweeps, e.g. runs=runs")


def _check_model(config: Config, trial: bool) -> None:
    model = config.model
    if model.path is not None:
        if trial and not model.path.strip():
            raise UserError(f"model={model.name} needs model.path=FOLDER, or a hub id")
        if model.path.startswith(("/", ".", "~")) and not Path(model.path).is_dir():
            raise UserError(f"model.path={model.path}: no such folder; give a folder or a hub id")
        return
    if model.width % model.heads:
        raise UserError(f"model.heads={model.heads} does not divide model.width={model.width}: change one of them")
    if model.heads % model.kv_heads:
        raise UserError(
            f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}: change one of them"
        )
    if model.family != "gpt2" and model.width // model.heads % 2:
        sizes = f"model.width={model.width} over model.heads={model.heads}"
        raise UserError(f"{sizes} gives heads of odd size: {model.family} needs an even size")


def check_data(config: Config) -> None:
    """Raise UserError for text that is asked for without saying which."""
    data = config.data
    for name, source, word in (("path", "files", "data=files"), ("names", "hub", "data.source=hub")):
        if getattr(data, name) and data.source != source:
            raise UserError(f"data.{name} is read with {word} alone, and data.source is {data.source}: add {word}")
    if data.source == "files":
        if not data.path:
            raise UserError("data.source=files needs data.path=FILE_OR_FOLDER")
        if not Path(data.path).exists():
            raise UserError(f"data.path={data.path}: no such file or folder")
    if data.source == "hub":
        if not data.names:
            raise UserError(
                "data.source=hub needs data.names=[NAME], e.g. data.names=[Salesforce/wikitext:wikitext-2-raw-v1]"
            )
        for name in data.names:
            if not HUB_DATA.fullmatch(name) or ".." in name:
                raise UserError(f"data.names holds {name!r}: write OWNER/NAME or OWNER/NAME:CONFIG")


def _check_pruning(config: Config) -> None:
    pruning, policy = config.pruning, config.pruning.policy
    if pruning.sparsity is not None and pruning.gamma is not None:
        raise UserError("pruning.sparsity and pruning.gamma are both set: give a target or a fixed weight, not both")
    if policy == "dense" and (pruning.sparsity is not None or pruning.gamma is not None):
        given = "sparsity" if pruning.sparsity is not None else "gamma"
        raise UserError(f"pruning.policy=dense drops nothing: leave pruning.{given} out, or choose another pruning")
    if policy == "learned" and pruning.sparsity is None and pruning.gamma is None:
        raise UserError("pruning.policy=learned needs pruning.sparsity=S in (0, 1), or pruning.gamma=G as in the paper")
    if policy in ("window", "strided", *RANKED) and pruning.sparsity is None:
        raise UserError(f"pruning.policy={policy} needs pruning.sparsity=S in (0, 1)")
    if pruning.freeze_backbone and policy != "learned":
        raise UserError(f"pruning.freeze_backbone=true leaves pruning.policy={policy} nothing to train: leave it out")
    if pruning.alpha_end < pruning.alpha_start:
        start = f"pruning.alpha_start={pruning.alpha_start}"
        raise UserError(f"pruning.alpha_end={pruning.alpha_end} is below {start}: sharpness only rises")


def _check_schedule(config: Config) -> None:
    train = config.train
    if train.warmup + train.decay > 1:
        raise UserError(
            f"train.warmup={train.warmup} and train.decay={train.decay} add up to more than 1: lower one of them"
        )
    workers = config.cluster.workers
    if train.batch % workers:
        below, above = train.batch // workers * workers, -(-train.batch // workers) * workers
        nearest = f"{below} or {above}" if below else f"{above}"
        raise UserError(f"train.batch={train.batch} is not divisible by cluster.workers={workers}: use {nearest}")


def _check_contexts(config: Config) -> None:
    context = config.train.context
    for length in config.evaluate.contexts:
        if length > context:
            fitting = ",".join(str(c) for c in config.evaluate.contexts if c <= context) or str(context)
            raise UserError(
                f"evaluate.contexts holds {length}, above train.context={context}: use evaluate.contexts=[{fitting}]"
            )
    if config.evaluate.tokens < context:
        raise UserError(f"evaluate.tokens={config.evaluate.tokens} is fewer than one train.context={context}: raise it")
    longest = config.benchmark.prompt + config.benchmark.new_tokens
    if config.model.path is None and config.model.family == "gpt2" and longest > context:
        raise UserError(
            f"benchmark.prompt + benchmark.new_tokens is {longest}, more than the train.context={context} positions of "
            "a gpt2 from scratch: lower one"
        )
    protected = config.policy.sinks + config.policy.recent
    if protected >= context:
        raise UserError(
            f"policy.sinks + policy.recent = {protected} protects the whole train.context={context}: lower them"
        )


def _check_gradients(config: Config) -> None:
    settings = config.gradients
    for name in ("parts", "queries", "lengths"):
        if not getattr(settings, name):
            raise UserError(f"gradients.{name} is empty: list at least one")
    most, shortest = max(settings.queries), min(settings.lengths)
    if most >= shortest:
        raise UserError(f"gradients.queries holds {most}, no fewer than gradients.lengths={shortest}: lower it")


def _check_kernels(config: Config) -> None:
    settings = config.kernels
    if settings.heads % settings.kv_heads:
        heads = f"kernels.heads={settings.heads}"
        raise UserError(f"kernels.kv_heads={settings.kv_heads} does not divide {heads}: change one of them")
    if not settings.operations:
        raise UserError(f"kernels.operations is empty: list some of {', '.join(WORDS['kernels.operations'])}")
    if settings.checkpoint is not None and not Path(settings.checkpoint).expanduser().is_dir():
        raise UserError(f"kernels.checkpoint={settings.checkpoint}: no such folder; give one written by train or sweep")


def _check_generation(config: Config) -> None:
    settings = config.generation
    if settings.width % settings.heads or settings.width // settings.heads % 2:
        width = f"generation.width={settings.width}"
        raise UserError(f"generation.heads={settings.heads} does not cut {width} into heads of even size: change one")
    if settings.heads % settings.kv_heads:
        heads = f"generation.heads={settings.heads}"
        raise UserError(f"generation.kv_heads={settings.kv_heads} does not divide {heads}: change one of them")
    for name in ("contexts", "batches", "drops"):
        if not getattr(settings, name):
            raise UserError(f"generation.{name} is empty: list at least one")
    if settings.checkpoint is not None and not Path(settings.checkpoint).expanduser().is_dir():
        given = f"generation.checkpoint={settings.checkpoint}"
        raise UserError(f"{given}: no such folder; give one written by train or sweep")


def _check_hidden(config: Config) -> None:
    settings = config.hidden
    if settings.width % settings.heads:
        width = f"hidden.width={settings.width}"
        raise UserError(f"hidden.heads={settings.heads} does not divide {width}: change one of them")
    if settings.base_tokens > settings.tokens:
        pieces, rows = f"hidden.base_tokens={settings.base_tokens}", f"hidden.tokens={settings.tokens}"
        raise UserError(f"{pieces} is above {rows}: pieces are cut out of rows, lower it")
    if len(settings.keep) != settings.layers:
        layers = f"hidden.layers={settings.layers}"
        raise UserError(f"hidden.keep has {len(settings.keep)} entries and {layers}: give one per layer")
    if settings.keep[0] != 1.0 or settings.keep != sorted(settings.keep, reverse=True) or settings.keep[-1] == 1.0:
        raise UserError(f"hidden.keep={settings.keep}: begin with 1.0, never rise, and end below 1.0")
    if not settings.batches:
        raise UserError("hidden.batches is empty: list at least one")


def check_long_texts(config: Config) -> None:
    """UserError unless benchmark target=hidden has its files, and no model that it would not look at."""
    if config.generate.checkpoint is not None:
        raise UserError("benchmark target=hidden trains models of its own: leave checkpoint out")
    holds = "lines of word, tab, tag" if config.hidden.task == "entities" else "lines of text, tab, label"
    if not config.hidden.train_file:
        raise UserError(f"benchmark target=hidden needs hidden.train_file=FILE, {holds}")
    for name in ("train_file", "test_file"):
        file = getattr(config.hidden, name)
        if file and not Path(file).is_file():
            raise UserError(f"hidden.{name}={file}: no such file; give {holds}")


def _check_generate(config: Config) -> None:
    asked, named = config.generate, []
    for name, on in (("max_live_tokens", asked.max_live_tokens), ("alarm_share", asked.alarm_share)):
        named += [name] if on is not None else []
    named += ["lossless"] if asked.lossless else []
    if len(named) > 1:
        raise UserError(f"generate.{named[0]} does not go with generate.{named[1]}: leave one of them out")
    if not config.feedback.loops:
        raise UserError(f"feedback.loops is empty: list some of {', '.join(WORDS['feedback.loops'])}")


def _check_engine(config: Config) -> None:
    if config.engine.offload and config.engine.zero < 2:
        raise UserError(f"engine.offload=true needs engine.zero=2 or 3, not {config.engine.zero}")
