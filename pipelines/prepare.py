"""What does a study learn from? Text is read, split, tokenised and stored once per (text, tokenizer)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctxprune.errors import UserError
from ctxprune.text import corpus, tokenizer
from ctxprune.text.token_store import read_tokens, write_tokens
from pipelines import store
from pipelines.compose import config_hash
from pipelines.config import Config, DataConfig
from pipelines.grid import Trial
from pipelines.progress import Bars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1
"""Raise when the meaning of a prepared corpus changes: old ones are then made anew."""


@dataclass
class Corpus:
    """A corpus that is on disk already (ids None) or waits to be written."""

    inputs: dict
    folder: Path
    tokens: tuple[int, int]
    """Of the training text and of the held-out text."""
    ids: tuple[list[np.ndarray], list[np.ndarray]] | None = None
    tokenizer: PreTrainedTokenizerFast | None = None


class Corpora:
    """The corpora of a study's trials: each text read and tokenised once, every mistake found before any is written.

    Raises UserError if the text is missing, empty, not UTF-8, or one side of it is shorter than a context.
    """

    def __init__(self, trials: list[Trial], bars: Bars):
        texts: dict[str, list[str]] = {}
        self.found: dict[str, Corpus] = {}
        for config in (trial.config for trial in trials):
            text = texts.setdefault(repr(config.data), [])
            text = texts[repr(config.data)] = text or _documents(config.data)
            if _key(config) not in self.found:
                known = {one.folder: one for one in self.found.values()}
                self.found[_key(config)] = _tokenised(text, config, bars, known)

    def check_benchmark(self, config: Config) -> None:
        """UserError where held-out text is shorter than what a trial's benchmark decodes."""
        length, there = config.benchmark.prompt + config.benchmark.new_tokens, self.found[_key(config)].tokens[1]
        if there < length:
            raise UserError(
                f"held-out text has {there} tokens, fewer than benchmark.prompt + benchmark.new_tokens = {length}: "
                "lower one"
            )

    def folder(self, config: Config) -> Path:
        """The tokenised corpus of a trial, written if it is not there yet."""
        corpus = self.found[_key(config)]
        if corpus.ids is None:
            return corpus.folder
        train, held_out = corpus.ids
        root = corpus.folder.parent
        folder = store.ensure(
            root, "data", corpus.inputs, lambda staged: write_tokens(staged, train, held_out, corpus.tokenizer)
        )
        corpus.ids = None  # gigabytes that nobody reads again
        return folder


def text_fingerprint(folder: Path) -> str | None:
    """Which text, and which part of it held out, a tokenised corpus was made of; None for one of no study."""
    path = folder / store.INPUTS
    if not path.is_file():
        return None
    inputs = json.loads(path.read_text())
    return config_hash({name: inputs[name] for name in ("text", "held_out")})


def _key(config: Config) -> str:
    return repr((config.data, config.model.path, config.train.context, config.runs))


def _tokenised(documents: list[str], config: Config, bars: Bars, known: dict[Path, Corpus]) -> Corpus:
    """known: by folder, those that are there already or wait to be written."""
    source = config.model.path
    brought = tokenizer.load_tokenizer(source) if source else None
    inputs = {
        "format": FORMAT,
        "text": corpus.source_fingerprint(documents),
        "held_out": config.data.held_out,
        "tokenizer": tokenizer.fingerprint(brought) if brought else {"vocab_size": config.data.vocab_size},
    }
    folder = store.folder_of(Path(config.runs) / "store", "data", inputs)
    if folder in known:
        _refuse_short(*known[folder].tokens, config)
        return known[folder]
    if store.finished(folder):
        tokens = read_tokens(folder)
        counts = len(tokens.train.tokens), len(tokens.held_out.tokens)
        _refuse_short(*counts, config)
        return Corpus(inputs, folder, counts)
    train, held_out = corpus.split_documents(documents, config.data.held_out)
    chosen = brought or tokenizer.train_tokenizer(train, config.data.vocab_size)
    first, total = sum(map(len, train)), sum(map(len, documents))
    with bars.task("tokenising (characters)", total) as advance:
        train_ids = tokenizer.encode_documents(chosen, train, lambda done, _: advance(done))
        held_out_ids = tokenizer.encode_documents(chosen, held_out, lambda done, _: advance(first + done))
    counts = sum(map(len, train_ids)), sum(map(len, held_out_ids))
    _refuse_short(*counts, config)
    return Corpus(inputs, folder, counts, (train_ids, held_out_ids), chosen)


def _refuse_short(train: int, held_out: int, config: Config) -> None:
    for name, count in (("train", train), ("held-out", held_out)):
        if count < config.train.context:
            raise UserError(
                f"{name} text has {count} tokens, fewer than train.context={config.train.context}: "
                "give more text or lower train.context"
            )


def _documents(data: DataConfig) -> list[str]:
    limit = int(data.max_megabytes * 1e6)
    if data.source == "stdlib":
        return corpus.stdlib_documents(limit)
    if data.source == "files":
        return corpus.file_documents(Path(data.path), data.text_field, limit)
    return corpus.hub_documents(data.names, data.text_field, limit)
