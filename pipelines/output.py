"""Who may write where? Results go to stdout through emit; progress, logs and libraries go to stderr."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
from typing import Any, TextIO

_lock = threading.Lock()
_stdout: TextIO | None = None


def take_stdout() -> None:
    """Keep stdout for emit; from here on whatever else prints to it, children included, lands on stderr."""
    global _stdout
    if _stdout is None:
        sys.stdout.flush()
        _stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
        os.dup2(2, 1)


def stdout() -> TextIO:
    """Where results go: the caller's stdout."""
    return _stdout or sys.stdout


def set_up_logging() -> None:
    """Our progress from INFO up, everybody else's from WARNING up, one line each on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("ctxprune", "pipelines"):
        logging.getLogger(name).setLevel(logging.INFO)


def emit(record: dict[str, Any], format: str, text: str | None = None) -> None:
    """One result: a JSON object on a line of its own (format=json), or the text for people, if there is any."""
    if format == "json":
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False)
    elif text is None:
        return
    else:
        line = text
    with _lock:
        print(line, file=stdout(), flush=True)


def finite(value: Any) -> Any:
    """The same value as strict JSON can carry it: NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def said(error: Exception) -> str:
    """What somebody else's code said when it failed, on one line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"failed here: {type(error).__name__}: {first[:160]}"
