"""Where else can results be seen?

A W&B run per trial, written from our own records; if it fails, a warning and no more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

from pipelines.config import Config, to_record
from pipelines.grid import trial_hash
from pipelines.worker import METRICS

logger = logging.getLogger("pipelines.tracking")


def mirror(config: Config, sweep: str, folder: Path, result: dict) -> None:
    """Copy a finished trial to W&B: run id = hash of its config, group = sweep; offline runs lie in
    runs/<sweep>/wandb."""
    if config.tracking.mode == "off":
        return
    try:
        _mirror(config, sweep, folder, result)
    except Exception as error:  # wandb's service raises kinds of its own; the record is ours, and no study ends for it
        logger.warning("W&B: %s was not mirrored (%s: %s)", folder.name, type(error).__name__, error)


def _mirror(config: Config, sweep: str, folder: Path, result: dict) -> None:
    import wandb

    settings = wandb.Settings(
        console="off", save_code=False, disable_git=True, silent=True, x_disable_stats=True, x_disable_meta=True
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        run = wandb.init(
            mode=config.tracking.mode,
            project=config.tracking.project,
            group=sweep,
            name=folder.name,
            id=trial_hash(config),
            dir=folder.parent,
            config=to_record(config),
            settings=settings,
            resume="allow" if config.tracking.mode == "online" else None,
        )
        try:
            for line in (folder / METRICS).read_text().splitlines():
                row = json.loads(line)
                if row.pop("kind") == "train":
                    run.log(row, step=row.pop("step"))
            for name, value in result.items():
                if isinstance(value, (int, float, str)):
                    run.summary[name] = value
        finally:
            run.finish()
