"""How do words become settings without hydra? SETTING=VALUE, the fields of KernelsConfig, repeats and format alone."""

from __future__ import annotations

import ast
import types
import typing
from pathlib import Path
from typing import Any

from ctxprune.errors import UserError
from pipelines import checks
from pipelines.compose import TYPES, nearest, one_line
from pipelines.config import BenchmarkConfig, Config, KernelsConfig

BARE = {"true": True, "false": False, "null": None}
"""As conf/ writes them."""


def usage() -> str:
    """What can be given."""
    return f"usage: python -m pipelines.kernel_benchmark [SETTING=VALUE ...], SETTING one of {', '.join(_hints())}"


def read(given: list[str]) -> Config:
    """The Config of the words; UserError, one line, for whatever a person can mend."""
    config, hints = Config(), _hints()
    for word in given:
        key, equals, text = word.partition("=")
        name = key.removeprefix("kernels.").removeprefix("benchmark.")
        if not equals:
            raise UserError(f"{one_line(word)!r} is not SETTING=VALUE, e.g. lengths=[1024,4096]")
        if name not in hints:
            raise UserError(f'no setting "{one_line(key)}"; nearest: {nearest(name, hints)}')
        holder = {"format": config, "repeats": config.benchmark}.get(name, config.kernels)
        setattr(holder, name, _value(word, text, hints[name]))
    checks.check(config, trial=False)
    if config.kernels.checkpoint is not None:
        config.kernels.checkpoint = str(Path(config.kernels.checkpoint).expanduser().absolute())
    return config


def _hints() -> dict[str, Any]:
    """Name and type of everything that can be set."""
    own = typing.get_type_hints(KernelsConfig)
    return own | {"repeats": typing.get_type_hints(BenchmarkConfig)["repeats"], "format": str}


def _value(word: str, text: str, hint: Any) -> Any:
    """The value that the text spells, of the field's type."""
    if typing.get_origin(hint) is list:
        (kind,) = typing.get_args(hint)
        inner = text.strip().removeprefix("[").removesuffix("]")
        return [_one(word, part, kind, ", or a list of them") for part in inner.split(",") if part.strip()]
    if isinstance(hint, types.UnionType):
        (kind,) = (kind for kind in typing.get_args(hint) if kind is not type(None))
        return None if text.strip() == "null" else _one(word, text, kind, " or null")
    return _one(word, text, hint, "")


def _one(word: str, text: str, kind: type, more: str) -> Any:
    text = text.strip()
    try:
        value = BARE[text] if text in BARE else ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        value = text  # a bare word
    if kind is str:
        return value if isinstance(value, str) else text
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{one_line(word)}: expected {TYPES[kind]}{more}")
    return value
