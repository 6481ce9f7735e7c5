"""What has been done already? Each step's output is kept under the hash of what went into it, whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ctxprune.checkpoint import MANIFEST, seal, sync, verify
from ctxprune.errors import UserError
from pipelines.compose import config_hash

INPUTS = "inputs.json"


def folder_of(store: Path, kind: str, inputs: dict) -> Path:
    """Where the output of a step with these inputs lies: store/kind-hash."""
    return store / f"{kind}-{config_hash(inputs)}"


def staging_of(folder: Path) -> Path:
    """Where a step writes while it runs; its metrics.jsonl can be watched there."""
    return folder.with_name(f".{folder.name}.staged")


def finished(folder: Path) -> bool:
    """Whether the step's output is there, whole."""
    return (folder / MANIFEST).is_file()


def ensure(store: Path, kind: str, inputs: dict, make: Callable[[Path], None]) -> Path:
    """The folder of a finished step, made by make(staged folder) if it is missing.

    inputs: plain values, everything the output depends on. The folder appears by one rename, after every file is hashed
    and flushed; what an interrupted run left behind is cleared. Two processes never make the same step at once.
    """
    folder = folder_of(store, kind, inputs)
    if finished(folder):
        return folder
    store.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if finished(folder):
            return folder
        staged = staging_of(folder)
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        staged.mkdir()
        write_json(staged / INPUTS, inputs)
        make(staged)
        seal(staged)
        os.rename(staged, folder)
        sync(store)
    return folder


def check(folder: Path) -> Path:
    """The folder again, after holding it against its manifest; a UserError names the damaged file."""
    try:
        verify(folder)
    except UserError as error:
        raise UserError(f"{error}; remove {folder} and run the same command again to make it anew") from None
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the step's lock, which the kernel frees when the process dies."""
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is being made by another process: wait for it, or stop it first") from None
        yield


def write_json(path: Path, value: object) -> None:
    """Write JSON by rename, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
