"""How do words become a Config? Hydra composes conf/, the dataclasses check the types, checks.py the values."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import typing
from pathlib import Path
from typing import Any

from ctxprune.errors import UserError
from pipelines import checks
from pipelines.config import Config

CONF = Path(__file__).resolve().parent.parent / "conf"
VERBS = ("sweep", "train", "evaluate", "benchmark", "generate", "report", "doctor")
# Verbs that work on something already trained: `checkpoint=FOLDER` is short for generate.checkpoint.
READS_CHECKPOINT = ("evaluate", "benchmark", "generate")
# Text is taken as it stands: a prompt may hold brackets and commas, which Hydra's grammar would read as lists.
LITERAL = ("generate.prompt", "generate.checkpoint", "kernels.checkpoint", "generation.checkpoint")
LITERAL += ("hidden.train_file", "hidden.test_file", "hidden.tokenizer", "runs")
LITERAL += ("study.train_file", "study.test_file")
CODE = re.compile(r"_(target|partial|args|recursive|convert)_")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def compose(verb: str, overrides: list[str]) -> Config:
    """The Config of one verb. Raises UserError, one line that names the setting, for whatever a person can mend.

    A sweep gets the frame of its trials: of a comma list the first value, and whole-trial checks are left
    to grid.expand. Nothing is written, and no text of conf/ or of the command line is ever run.
    """
    if verb not in VERBS:
        raise UserError(f"no verb {verb!r}; nearest: {nearest(verb, VERBS)}")
    words, folder = _short_forms(verb, overrides)
    items = [parse(word) for word in words]
    for item in items:
        if item.is_sweep_override() and verb != "sweep":
            raise UserError(f"{item.input_line}: {verb} takes one value; several values are for sweep")
    config = build(verb, [values(item)[0] for item in items])
    checks.check(config, trial=verb == "train")
    if folder is not None:
        config.runs, config.sweep.name = str(folder.parent), folder.name
    if verb in READS_CHECKPOINT:
        _require_checkpoint(verb, config)
    if verb == "generate" and not config.generate.prompt.strip():
        raise UserError("generate.prompt is empty: give the text to continue")
    return config


def build(verb: str, overrides: list[str]) -> Config:
    """Compose already parsed overrides into the dataclasses; the values are not checked yet."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException, ValidationError

    if "schema.yaml" not in ConfigStore.instance().repo:
        ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            node = hydra_compose(verb, overrides=overrides)
        _refuse_outside_values(OmegaConf.to_container(node, resolve=False))
        config = typing.cast(Config, OmegaConf.to_object(node))
    except (HydraException, OmegaConfBaseException) as error:
        cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
        if isinstance(cause, ValidationError) and cause.full_key:
            raise UserError(_wrong_type(cause.full_key, overrides)) from None
        raise UserError(one_line(str(error).split("\n")[0])) from None
    _absolute_paths(config)
    return config


def parse(word: str) -> Any:
    """One override, read by Hydra's parser and found harmless: its key is a setting, or a group with that option."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType, ValueType
    from hydra.errors import HydraException

    key, equals, value = word.partition("=")
    _refuse_code(key if key in LITERAL else word)
    if not equals and not word.startswith("~"):
        raise UserError(f"{one_line(word)!r} is not SETTING=VALUE, e.g. train.steps=100")
    if key in LITERAL:
        word = f"{key}={_quoted(value)}"
    try:
        item = OverridesParser.create().parse_override(word)
    except (RecursionError, ValueError):  # brackets nested too deep, a number with thousands of digits
        raise UserError(f"{one_line(word)}: cannot be read; write a shorter value") from None
    except HydraException as error:
        reason = one_line(str(error).split("\n")[1] if "\n" in str(error) else str(error))
        raise UserError(f"{one_line(word)}: cannot be read ({reason}); quote text: '{key}=\"...\"'") from None
    if item.type is not OverrideType.CHANGE or item.package is not None:
        raise UserError(f"{one_line(word)}: settings can be changed, not added, removed or moved; write SETTING=VALUE")
    if item.value_type in (ValueType.INTERVAL_SWEEP, ValueType.GLOB_CHOICE_SWEEP):
        raise UserError(f"{one_line(word)}: interval() and glob() are not read; list the values, e.g. {key}=1,2")
    _check_key(item.key_or_group, values(item, limit=1000))
    return item


def values(item: Any, limit: int = 1000) -> list[str]:
    """An override as one override per value, comma lists, choice() and range() expanded; at most `limit` values."""
    if not item.is_sweep_override():
        return [item.input_line]
    found: list[str] = []
    for value in item.sweep_string_iterator():
        if len(found) == limit:
            raise UserError(f"{one_line(item.input_line)}: more than {limit} values; list fewer")
        found.append(f"{item.key_or_group}={value}")
    if not found:
        raise UserError(f"{one_line(item.input_line)}: an empty list of values; list at least one")
    return found


def settings() -> dict[str, Any]:
    """Dotted name of every setting, with its type."""

    def below(kind: Any, prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, hint in typing.get_type_hints(kind).items():
            found |= below(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else {prefix + name: hint}
        return found

    return below(Config, "")


def groups() -> dict[str, list[str]]:
    """Every group of conf/ with its options."""
    return {d.name: sorted(f.stem for f in d.glob("*.yaml")) for d in sorted(CONF.iterdir()) if d.is_dir()}


def config_hash(config_part: dict) -> str:
    """16 hex digits that depend on the content alone: sha256 of canonical JSON."""
    text = json.dumps(config_part, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """The known word most like the one given."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def one_line(text: str, length: int = 120) -> str:
    """Text safe to print inside a one-line message: control characters spelled out, the rest cut off."""
    visible = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return visible if len(visible) <= length else visible[: length - 3] + "..."


def _check_key(key: str, written: list[str]) -> None:
    known, options = settings(), groups()
    if key in options:
        for value in written:
            option = value.partition("=")[2]
            if option not in options[key]:
                raise UserError(
                    f"no {key} {one_line(option)!r}; nearest: {nearest(option, options[key])}"
                    f" (there are {', '.join(options[key])})"
                )
    elif key not in known:
        inside = [name for name in known if name.startswith(key + ".")]
        if inside:
            raise UserError(f"{key!r} is a section: set one of its fields, e.g. {inside[0]}=...")
        raise UserError(f'no setting "{one_line(key)}"; nearest: {nearest(key, [*known, *options])}')


def _refuse_code(word: str) -> None:
    key = word.partition("=")[0].lstrip("+~")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        raise UserError(f"{one_line(word)}: Hydra's own settings are not read; runs=FOLDER says where results go")
    if CODE.search(word):
        raise UserError(f"{one_line(word)}: a configuration holds values and never names code to run")


def _refuse_outside_values(node: Any, name: str = "") -> None:
    """Refuse resolvers such as ${oc.env:HOME}: they would carry the environment's secrets into the records."""
    if isinstance(node, dict):
        for key, value in node.items():
            _refuse_outside_values(value, f"{name}.{key}" if name else str(key))
    elif isinstance(node, list):
        for value in node:
            _refuse_outside_values(value, name)
    elif isinstance(node, str) and name not in LITERAL and re.search(r"\$\{.*:", node, re.DOTALL):
        what = "a secret of the environment" if SECRET.search(node) else "a value from outside the configuration"
        raise UserError(
            f"{name}={one_line(node)}: asks for {what}, which would end up in the records; write the value itself"
        )


def _wrong_type(full_key: str, overrides: list[str]) -> str:
    key = full_key.split("[")[0]
    hint = settings()[key]
    options = [t for t in typing.get_args(hint) if t is not type(None)]
    listed = typing.get_origin(hint) is list
    kind = TYPES[options[0] if options else hint]
    wanted = f"a list, e.g. {key}=[...], each {kind}" if listed else kind + (" or null" if options else "")
    given = next((o for o in reversed(overrides) if o.startswith(key + "=")), key)
    return f"{one_line(given)}: expected {wanted}"


def _quoted(value: str) -> str:
    """A Hydra string that reads back as exactly this text; ${ is escaped, so that a prompt is never interpolated."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" and value[0] not in value[1:-1]:
        value = value[1:-1]
    text = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value)
    text = re.sub(r"(\\*)(\"|$)", lambda m: m[1] * 2 + ("\\" if m[2] else "") + m[2], text)
    return f'"{text}"'


def _absolute_paths(config: Config) -> None:
    """Workers may stand in another folder than the person who typed the path."""
    if config.runs.strip():
        config.runs = str(Path(config.runs).expanduser().absolute())
    if config.data.path:
        config.data.path = str(Path(config.data.path).expanduser().absolute())
    if config.model.path and (config.model.path.startswith(("/", ".", "~")) or Path(config.model.path).is_dir()):
        config.model.path = str(Path(config.model.path).expanduser().absolute())
    if config.model.path and config.model.name == "local":
        # A folder's own name says more in tables than "local".
        config.model.name = (
            re.sub(r"[^a-z0-9._-]+", "-", Path(config.model.path).name.lower()).strip("-._")[:48] or "local"
        )
    for name in ("train_file", "test_file", "tokenizer"):
        given = getattr(config.hidden, name)
        if given and (name != "tokenizer" or Path(given).expanduser().is_dir()):  # else a hub id
            setattr(config.hidden, name, str(Path(given).expanduser().absolute()))
    for name in ("train_file", "test_file"):
        if given := getattr(config.study, name):
            setattr(config.study, name, str(Path(given).expanduser().absolute()))
    for holder in (config.generate, config.kernels, config.generation):
        if holder.checkpoint:
            holder.checkpoint = str(Path(holder.checkpoint).expanduser().absolute())


def _short_forms(verb: str, overrides: list[str]) -> tuple[list[str], Path | None]:
    """checkpoint=FOLDER, benchmark target=NAME, and for report sweep=NAME_OR_FOLDER: the words in full without the
    latter, and the folder of the sweep."""
    if verb in READS_CHECKPOINT:
        full = [re.sub(r"^checkpoint=", "generate.checkpoint=", word) for word in overrides]
        return [re.sub(r"^target=", "benchmark.target=", word) for word in full], None
    if verb != "report":
        return overrides, None
    words = [word for word in overrides if not word.startswith(("sweep=", "sweep.name="))]
    named = [word.partition("=")[2] for word in words if word.startswith("runs=")]
    runs = Path(named[-1] if named else Config().runs).expanduser()
    given = [word.partition("=")[2] for word in overrides if word not in words]
    name = given[-1] if given else Config().sweep.name
    if checks.NAME.fullmatch(name) and (runs / name).is_dir():
        return words, runs / name
    folder = Path(name).expanduser().absolute()
    if name.strip() and folder.is_dir():
        return words, folder
    there = sorted(p.name for p in runs.iterdir() if p.is_dir()) if runs.is_dir() else []
    hint = f"nearest: {nearest(name, there)}" if there else "run ./launch.sh sweep first"
    raise UserError(f"no sweep {one_line(name)!r} in {runs}; {hint}")


def _require_checkpoint(verb: str, config: Config) -> None:
    checks.check_data(config)
    folder = config.generate.checkpoint
    if verb == "benchmark" and config.benchmark.target == "gradients" and (config.model.path or "").strip():
        if folder:
            raise UserError("checkpoint and model.path are both set: which model? leave one of them out")
        return
    if verb == "benchmark" and config.benchmark.target in ("kernels", "generation"):
        # A model is one of two things to measure there, and checkpoint=FOLDER is short for it.
        measured = config.kernels if config.benchmark.target == "kernels" else config.generation
        measured.checkpoint = measured.checkpoint or folder
        checks.check(config, trial=False)
        return
    if verb == "benchmark" and config.benchmark.target == "hidden":
        checks.check_long_texts(config)
        return
    if verb == "benchmark" and config.benchmark.target == "cascade":
        return
    if not folder:
        raise UserError("which model? give checkpoint=FOLDER, written by train or sweep")
    if not Path(folder).is_dir():
        raise UserError(f"checkpoint={folder}: no such folder; give one written by train or sweep")
