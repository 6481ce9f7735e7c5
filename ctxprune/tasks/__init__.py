"""What must still be answered from a pruned context? One task per file; all of them give the same batches.

A task is a frozen config dataclass of plain values (ctxprune.tasks.task); ctxprune.tasks.scoring says how well a model
did.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from difflib import get_close_matches

from ctxprune.errors import UserError
from ctxprune.tasks.agnews import AgNewsConfig
from ctxprune.tasks.classes import ClassesConfig
from ctxprune.tasks.dialogsum import DialogSumConfig
from ctxprune.tasks.dialogue import DialogueConfig
from ctxprune.tasks.multi30k import Multi30kConfig
from ctxprune.tasks.needle import NeedleConfig
from ctxprune.tasks.overwrite import OverwriteConfig
from ctxprune.tasks.questions import QuestionsConfig
from ctxprune.tasks.recall import RecallConfig
from ctxprune.tasks.recall_invisible import RecallInvisibleConfig
from ctxprune.tasks.sst2 import Sst2Config
from ctxprune.tasks.task import Task
from ctxprune.tasks.wnut17 import Wnut17Config

SYNTHETIC = (RecallConfig, NeedleConfig, OverwriteConfig, QuestionsConfig, DialogueConfig, RecallInvisibleConfig)
"""Tasks whose truth is known and that small models learn in minutes."""
FROM_FILES = (ClassesConfig, Sst2Config, AgNewsConfig, Wnut17Config, DialogSumConfig, Multi30kConfig)
"""Tasks whose examples are read from local files."""
TASKS: dict[str, type] = {config.name: config for config in SYNTHETIC + FROM_FILES}


def to_dict(task: Task) -> dict[str, object]:
    """Plain values, the task's name first."""
    return {"task": task.name, **asdict(task)}


def from_dict(values: dict[str, object]) -> Task:
    """The inverse of to_dict; UserError on an unknown task or field, with the nearest that there is."""
    values = dict(values)
    name = values.pop("task", None)
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}: {_nearest(str(name), list(TASKS))}")
    known = [field.name for field in fields(TASKS[name])]
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"task {name} has no setting {unknown[0]!r}: {_nearest(unknown[0], known)}")
    try:
        return TASKS[name](**values)
    except TypeError as error:
        raise UserError(f"task {name}: {error}") from error


def _nearest(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}"
