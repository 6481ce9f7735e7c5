"""Which rows does a study read from a person's texts? Token ids made once, kept under the files' digests.

A policy of the study decides where the contexts of a batch end, and these must end together, without padding. So a
batch is of texts that are neighbours in length, and all of it is cut to one length, a multiple of STEP tokens: the
FIRST tokens stay, at most 2 * STEP - 2 of a text are lost in the thick of the lengths, more where texts are rare. Then
a half, a quarter and an eighth of a context are whole numbers of keys. What stands behind the context is the task's
prompt and the answer: a token that stands for the label (its first, if that will do), or the first tokens of a
translation or a summary, each of which is a question, given the right ones before it. These are cut to the shortest of
a batch, whose answers are neighbours in length too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from ctxprune import tasks
from ctxprune.checkpoint import digest
from ctxprune.errors import UserError
from ctxprune.tasks.agnews import AgNewsConfig
from ctxprune.tasks.classes import ClassesConfig
from ctxprune.tasks.dialogsum import DialogSumConfig
from ctxprune.tasks.examples import Example, held_out
from ctxprune.tasks.multi30k import Multi30kConfig
from ctxprune.tasks.prompted import FileTask
from ctxprune.tasks.sst2 import Sst2Config
from ctxprune.tasks.task import SPLITS, Split, TaskBatch, stream
from ctxprune.text.batches import IGNORED
from ctxprune.text.tokenizer import encode_documents, train_tokenizer
from pipelines import store
from pipelines.policy_study.config import StudyConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

READ: tuple[type[FileTask], ...] = (ClassesConfig, AgNewsConfig, Sst2Config, Multi30kConfig, DialogSumConfig)
"""Tasks from files whose whole text has one answer: a label, a translation or a summary."""
HOLDS = {
    Multi30kConfig.name: "sentences, a line each, beside a file of their translations with the suffix .de",
    DialogSumConfig.name: "JSON lines of dialogue and summary",
}
"""What a file holds; of the others lines of text, tab, label."""
KIND = "study-rows"
FORMAT = 2
"""Raised when the rows would differ for the same inputs."""
VOCAB = 2048
"""Entries of the byte-level BPE that is learned from the texts trained on: embeddings of a small model stay small."""
STEP = 8
"""Contexts are so many tokens, or twice, three times ... as many."""
SHORTEST, LONGEST = 24, 256
"""Tokens of a text, the one that opens it included: fewer are left out (an eighth of 16 tokens is no more than what
every policy protects), more are cut."""
ANSWER = 32
"""Tokens of a translation or a summary at most."""
NEAR = 4
"""Answers whose lengths differ by fewer tokens are neighbours."""
WINDOW = 64
"""Neighbours in length that a batch is taken from."""


@dataclass(frozen=True)
class Texts:
    """The rows of one folder of the store, as a task. Nobody knows which tokens are needed, or how hard a row is."""

    name: ClassVar[str] = "texts"

    folder: str
    """Where the rows lie."""

    @property
    def vocab_size(self) -> int:
        """Every token id is below it."""
        return _about(self.folder)["vocab_size"]

    def rows(self, split: Split) -> int:
        """How many different rows the batches of an epoch of WINDOW rows have."""
        return _count(self.folder, split) // WINDOW * WINDOW

    def batch(self, split: Split, seed: int, index: int, size: int) -> TaskBatch:
        """`size` rows of neighbours in length, another mixture for each (seed, epoch). An epoch is the windows of
        WINDOW rows, one per batch, so that no two of its batches share a row; a smaller batch is a part of its window.
        UserError for a batch of more rows than the split has."""
        stream(split, seed, index)  # says no to what is no split and no number
        count, width = _count(self.folder, split), max(size, WINDOW)
        if count < width:
            raise UserError(f"a batch of {width} rows was asked for, and the {split} split has {count}: give more")
        epoch, place = divmod(index, count // width)
        chosen = _windows(self.folder, split, seed, epoch, width)[place, :size]
        held, about = _tensors(self.folder), _about(self.folder)
        context, end = _first(held, split, "texts", chosen, STEP)
        answer, said = _first(held, split, "answers", chosen, 1)
        prompt = np.broadcast_to(np.array(about["prompt"]), (size, len(about["prompt"])))
        row = torch.from_numpy(np.concatenate([context, prompt, answer], 1))
        answers, questions = torch.full_like(row, IGNORED), torch.full_like(row, -1)
        asked = slice(-said - 1, -1)
        answers[:, asked], questions[:, asked] = torch.from_numpy(answer), torch.arange(said)
        return TaskBatch(row, answers, questions, torch.full((size,), end))


def _first(held: dict[str, np.ndarray], split: str, name: str, chosen: np.ndarray, step: int) -> tuple[np.ndarray, int]:
    """As many tokens of these rows' texts or answers as the shortest has, in whole steps: [rows, tokens], and that."""
    ids, begins, lengths = (held[f"{split}.{name}.{part}"] for part in ("ids", "begins", "lengths"))
    end = int(lengths[chosen].min()) // step * step
    return np.stack([ids[begin : begin + end] for begin in begins[chosen]]).astype(np.int64), end


def from_files(task: str) -> bool:
    """Whether it is one of the tasks that are read from a person's files."""
    return task in [one.name for one in READ]


def check(study: StudyConfig) -> None:
    """UserError, before anything is read, unless tasks and files of a study go together."""
    known = ", ".join([*(one.name for one in tasks.SYNTHETIC), *(one.name for one in READ)])
    for name in study.tasks:
        if tasks.TASKS[name] not in (*tasks.SYNTHETIC, *READ):
            raise UserError(f"study.tasks has {name!r}, whose texts have no answer each: choose from {known}")
    read = list(filter(from_files, study.tasks))
    holds = HOLDS.get(read[0], "lines of text, tab, label") if read else ""
    if read and not study.train_file:
        raise UserError(f"study.tasks has {read[0]!r}: give study.train_file=FILE, {holds}")
    if len(read) > 1:
        raise UserError(f"study.train_file is of one task, study.tasks has {' and '.join(read)}: study them in turn")
    for name in ("train_file", "test_file"):
        file = getattr(study, name)
        if file and not read:
            those = ", ".join(one.name for one in READ)
            raise UserError(f"study.{name} is for one of {those} in study.tasks: leave it out, or name the task")
        if file and not Path(file).is_file():
            raise UserError(f"study.{name}={file}: no such file; give {holds}")
        for one in reader(read[0], file, None).files(file) if file else []:
            if not Path(one).is_file():
                raise UserError(f"study.{name}={file}: {one} is missing; give {holds}")


def rows_of(root: Path, study: StudyConfig, name: str) -> str | None:
    """What `kept` says of a study's task of files; None: the rows of a synthetic one are in no file."""
    if not from_files(name):
        return None
    assert study.train_file is not None
    return kept(root, name, study.train_file, study.test_file, study.rows)


def reader(task: str, train: str, test: str | None) -> FileTask:
    """Of these files. Its tokenizer is not asked for: the one that is learned here is."""
    return next(one for one in READ if one.name == task)(file=train, test_file=test or "", tokenizer=KIND)


def inputs_of(task: str, train: str, test: str | None) -> dict:
    """What the rows of these files depend on."""
    read = [reader(task, train, test).files(file) if file else [] for file in (train, test)]
    digests = [[digest(Path(file)) for file in files] for files in read]
    sizes = {"vocab": VOCAB, "tokens": [SHORTEST, LONGEST], "answer": ANSWER}
    return {"format": FORMAT, "task": task, "files": digests, **sizes}


def kept(root: Path, task: str, train: str, test: str | None, rows: int | None) -> str:
    """The name of the folder of these files' rows in the store, made unless that is done.

    UserError for files that hold no such task, and for fewer than `rows` test texts: nothing is written then.
    """
    inputs = inputs_of(task, train, test)
    folder = store.folder_of(root, KIND, inputs)
    made = None if store.finished(folder) else encoded(task, train, test)
    lengths = _tensors(str(folder)) if made is None else made[0]
    _enough(test or train, {split: len(lengths[f"{split}.texts.lengths"]) for split in SPLITS}, rows)
    if made is not None:
        tensors, about = made

        def write(staged: Path) -> None:
            save_file(tensors, staged / "rows.safetensors")
            store.write_json(staged / "rows.json", about)

        store.ensure(root, KIND, inputs, write)
    return folder.name


def restored(root: Path, values: dict) -> tasks.Task:
    """The task of the plain values in jobs.model_inputs: one whose rows are kept, or one of ctxprune.tasks."""
    return Texts(str(root / values["rows"])) if "rows" in values else tasks.from_dict(values)


def encoded(task: str, train: str, test: str | None) -> tuple[dict[str, np.ndarray], dict]:
    """Per split flat token ids of texts and of answers, where each begins and its length; and, as plain values, the
    prompt in tokens and the vocabulary's size. UserError for what is no such file."""
    read = reader(task, train, test)
    splits = held_out(list(read.examples(train)), list(read.examples(test)) if test else None)
    if read.labels and len({example.label for example in splits["train"]}) < 2:
        raise UserError(f"{train}: every text to train on has one label; give two labels or more")

    def asked(example: Example) -> tuple[str, str]:
        return next(iter(read.questions(example)))

    tokenizer = train_tokenizer([example.text + "".join(asked(example)) for example in splits["train"]], VOCAB)
    answer_of = None
    if read.labels:
        labels = [asked(Example("", label))[1] for label in read.labels]
        answer_of = dict(zip(labels, label_tokens(tokenizer, labels), strict=True))
    tensors: dict[str, np.ndarray] = {}
    for split in SPLITS:
        texts = [one[:LONGEST] for one in encode_documents(tokenizer, [example.text for example in splits[split]])]
        long = [(ids, example) for ids, example in zip(texts, splits[split], strict=True) if len(ids) >= SHORTEST]
        answers = [asked(example)[1] for _, example in long]
        said = [[answer_of[one]] if answer_of else _plain(tokenizer, one)[:ANSWER] for one in answers]
        tensors |= _flat(f"{split}.texts", [ids for ids, _ in long]) | _flat(f"{split}.answers", said)
    prompts = {prompt for prompt, _ in map(asked, splits["train"])}
    assert len(prompts) == 1, "a task that asks differently by label gives it away"
    ids = max([len(tokenizer) - 1, *(answer_of or {}).values()]) + 1
    return tensors, {"prompt": _plain(tokenizer, prompts.pop()), "vocab_size": ids}


def _flat(name: str, rows: Sequence[Sequence[int] | np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of token ids one after the other, where each begins, and its length."""
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    ids = np.concatenate([np.zeros(0, np.int32), *(np.asarray(row, np.int32) for row in rows)])
    return {f"{name}.ids": ids, f"{name}.begins": lengths.cumsum(dtype=np.int64) - lengths, f"{name}.lengths": lengths}


def label_tokens(tokenizer: PreTrainedTokenizerFast, answers: Sequence[str]) -> list[int]:
    """A token for each label: its first; where two begin alike, which would not tell them apart, all have one of their
    own behind the vocabulary."""
    first = [_plain(tokenizer, answer)[0] for answer in answers]
    alike = len(set(first)) < len(first)
    return list(range(len(tokenizer), len(tokenizer) + len(answers))) if alike else first


def _enough(file: str, there: dict[Split, int], rows: int | None) -> None:
    """UserError unless every split fills a window, and the test split as many rows as are asked for."""
    for split, count in there.items():
        if count < WINDOW:
            short = f"{count} {split} texts of {SHORTEST} tokens or more, fewer than {WINDOW}"
            raise UserError(f"{file}: there are {short}: give more or longer texts")
    if rows is not None and rows > (most := there["test"] // WINDOW * WINDOW):
        given = f"the {most} test texts that {file} gives in batches of {WINDOW}"
        raise UserError(f"study.rows={rows} is above {given}: lower it, or give more")


def _plain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@lru_cache(maxsize=4)
def _tensors(folder: str) -> dict[str, np.ndarray]:
    return load_file(Path(folder, "rows.safetensors"))


@lru_cache(maxsize=4)
def _about(folder: str) -> dict:
    return json.loads(Path(folder, "rows.json").read_text())


def _count(folder: str, split: Split) -> int:
    """How many texts the split has."""
    return len(_tensors(folder)[f"{split}.texts.lengths"])


@lru_cache(maxsize=16)
def _windows(folder: str, split: Split, seed: int, epoch: int, width: int) -> np.ndarray:
    """Windows [windows, width] of an epoch, in a random order: neighbours in length, those of one step mixed but for
    the lengths of their answers. The few texts that fill no window are others in each epoch."""
    held, draw = _tensors(folder), stream(split, seed, epoch)
    lengths, said = (held[f"{split}.{name}.lengths"] for name in ("texts", "answers"))
    order = np.lexsort((draw.permutation(len(lengths)), said // NEAR, lengths // STEP))
    count, over = divmod(len(lengths), width)
    begin = int(draw.integers(over + 1))
    windows = order[begin : begin + count * width].reshape(count, width)
    return draw.permuted(windows[draw.permutation(count)], axis=1)
