"""Which tokens of which texts are classified? A person's labelled files as rows of one length, kept for the next start.

The classes are the labels of the training file. Longer texts are cut, shorter ones left out: no row has padding, so
that FLOPs and times are those of full rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctxprune.checkpoint import digest
from ctxprune.errors import UserError
from ctxprune.tasks.examples import Example, changed, column_of_words, held_out, table
from ctxprune.tasks.task import SPLITS, Split
from ctxprune.text.tokenizer import encode_documents, fingerprint, load_tokenizer, train_tokenizer
from pipelines import store
from pipelines.benchmark_config import HiddenConfig
from pipelines.hidden_benchmark import entities

FORMAT = 1
"""Raised when the rows would differ for the same inputs."""


@dataclass(frozen=True)
class Rows:
    """By split, token ids [rows, tokens] and class indices: [rows], or [rows, tokens] where words have tags, IGNORED
    but at the first token of each. The first token of a row opens it (as CLS)."""

    ids: dict[Split, Int64[Tensor, "rows tokens"]]
    classes: dict[Split, Int64[Tensor, "rows ..."]]
    labels: list[str]
    vocab_size: int
    left_out: dict[Split, int]
    """Texts that were too short, or sentences that were too long."""
    inputs: dict
    """What all of this depends on."""


def inputs_of(settings: HiddenConfig) -> dict:
    """What rows depend on; UserError for a file or a tokenizer that is not there."""
    assert settings.train_file is not None
    files = [settings.train_file, settings.test_file]
    for file in files:
        if file:
            changed(file)
    words = fingerprint(load_tokenizer(settings.tokenizer)) if settings.tokenizer else settings.vocab
    read = [digest(Path(file)) if file else None for file in files]
    task = {} if settings.task == "classes" else {"task": settings.task}
    return {"format": FORMAT, "files": read, "tokenizer": words, "tokens": settings.tokens, **task}


def rows_of(root: Path, settings: HiddenConfig) -> Rows:
    """The rows of the person's files, made unless that is done. UserError for files that hold no task."""
    inputs = inputs_of(settings)
    make = _make if settings.task == "classes" else _make_tagged
    folder = store.ensure(root, "hidden-rows", inputs, lambda staged: make(settings, staged))
    about, tensors = json.loads((folder / "rows.json").read_text()), load_file(folder / "rows.safetensors")
    ids: dict[Split, Tensor] = {split: tensors[f"{split}.ids"].long() for split in SPLITS}
    classes: dict[Split, Tensor] = {split: tensors[f"{split}.classes"].long() for split in SPLITS}
    if settings.task == "entities" and not entities.named(classes[settings.judged_on], about["labels"]):
        raise UserError(f"no sentence of the {settings.judged_on} split has a name: give more, or a hidden.test_file")
    if not len(ids[settings.judged_on]):
        short = f"no text of the {settings.judged_on} split has hidden.tokens={settings.tokens} tokens"
        raise UserError(f"{short}: lower it, or give longer texts")
    return Rows(ids, classes, inputs=inputs, **about)


def _make(settings: HiddenConfig, staged: Path) -> None:
    assert settings.train_file is not None
    examples = list(table(settings.train_file, None))
    labels = sorted({example.label for example in examples})
    if len(labels) < 2:
        raise UserError(f"{settings.train_file}: every text has the label {labels[0]!r}; give two labels or more")
    tests = list(table(settings.test_file, tuple(labels))) if settings.test_file else None
    splits = held_out(examples, tests)
    tokenizer = _tokenizer(settings, splits["train"])
    tensors, left_out = {}, {}
    for split in SPLITS:
        encoded = encode_documents(tokenizer, [example.text for example in splits[split]])
        long = [len(one) >= settings.tokens for one in encoded]
        left_out[split] = long.count(False)
        cut = [one[: settings.tokens] for one, enough in zip(encoded, long, strict=True) if enough]
        there = [example for example, enough in zip(splits[split], long, strict=True) if enough]
        missing = sorted(set(labels) - {example.label for example in there})
        if split == "train" and missing:
            short = f"no text labelled {missing[0]!r} to train on has hidden.tokens={settings.tokens} tokens"
            raise UserError(f"{short}: lower it, or take its lines out")
        tensors[f"{split}.ids"] = torch.from_numpy(np.stack(cut)) if cut else torch.zeros(0, settings.tokens).int()
        tensors[f"{split}.classes"] = torch.tensor([labels.index(example.label) for example in there]).int()
    save_file(tensors, staged / "rows.safetensors")
    about = {"labels": labels, "vocab_size": max(tokenizer.get_vocab().values()) + 1, "left_out": left_out}
    store.write_json(staged / "rows.json", about)


def _make_tagged(settings: HiddenConfig, staged: Path) -> None:
    assert settings.train_file is not None
    examples = list(column_of_words(settings.train_file, None))
    labels = entities.checked(settings.train_file, examples)
    tests = list(column_of_words(settings.test_file, tuple(labels))) if settings.test_file else None
    splits = held_out(examples, tests)
    tokenizer = _tokenizer(settings, splits["train"])
    tensors, left_out = {}, {}
    for split in SPLITS:
        sentences = entities.encoded(tokenizer, splits[split], labels)
        ids, tags, left_out[split] = entities.joined(sentences, settings.tokens)
        tensors |= {f"{split}.ids": ids, f"{split}.classes": tags}
    if not len(tensors["train.ids"]):
        raise UserError(f"no sentence to train on fits hidden.tokens={settings.tokens}: raise it, or give more")
    save_file(tensors, staged / "rows.safetensors")
    about = {"labels": labels, "vocab_size": max(tokenizer.get_vocab().values()) + 1, "left_out": left_out}
    store.write_json(staged / "rows.json", about)


def _tokenizer(settings: HiddenConfig, examples: list[Example]):
    """The person's, or one learned from the texts trained on."""
    if settings.tokenizer:
        return load_tokenizer(settings.tokenizer)
    return train_tokenizer([example.text for example in examples], settings.vocab)
