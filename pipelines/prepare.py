"""What does a study learn from? Text is read, split, tokenised and stored once per (text, tokenizer)."""

from __future__ import annotations

from pathlib import Path

from ctxprune import corpus, tokenizer
from ctxprune.errors import UserError
from ctxprune.token_store import read_tokens, write_tokens
from pipelines import store
from pipelines.config import Config, DataConfig
from pipelines.grid import Trial
from pipelines.progress import Bars

FORMAT = 1
"""Raise when the meaning of a prepared corpus changes: old ones are then made anew."""


class Corpora:
    """The corpora of a study's trials, each text read and tokenised once, and all mistakes found before any is
    written."""

    def __init__(self, trials: list[Trial]):
        self.documents: dict[str, list[str]] = {}
        self.folders: dict[str, Path] = {}
        for trial in trials:
            data = trial.config.data
            self.documents.setdefault(repr(data), _documents(data))

    def prepare(self, config: Config, bars: Bars) -> Path:
        """The folder of the tokenised corpus of a trial.

        The tokenizer is the pretrained model's, or trained on the text. Raises UserError if a side is shorter than one
        context.
        """
        source = config.model.path
        key = repr((config.data, source, config.train.context))
        if key not in self.folders:
            self.folders[key] = _tokenised(self.documents[repr(config.data)], config, source, bars)
        return self.folders[key]


def _tokenised(documents: list[str], config: Config, source: str | None, bars: Bars) -> Path:
    brought = tokenizer.load_tokenizer(source) if source else None
    inputs = {
        "format": FORMAT,
        "text": corpus.source_fingerprint(documents),
        "held_out": config.data.held_out,
        "tokenizer": tokenizer.fingerprint(brought) if brought else {"vocab_size": config.data.vocab_size},
    }
    root = Path(config.runs) / "store"
    folder = store.folder_of(root, "data", inputs)
    if store.finished(folder):
        tokens = read_tokens(folder)
        _refuse_short(len(tokens.train.tokens), len(tokens.held_out.tokens), config)
        return folder
    train, held_out = corpus.split_documents(documents, config.data.held_out)
    chosen = brought or tokenizer.train_tokenizer(train, config.data.vocab_size)
    with bars.task("tokenising (documents)", len(train) + len(held_out)) as advance:
        train_ids = tokenizer.encode_documents(chosen, train, lambda done, total: advance(done))
        held_out_ids = tokenizer.encode_documents(chosen, held_out, lambda done, total: advance(len(train) + done))
    # Before the store is touched: a text too short is a person's mistake, and those leave nothing behind.
    _refuse_short(sum(map(len, train_ids)), sum(map(len, held_out_ids)), config)
    return store.ensure(root, "data", inputs, lambda staged: write_tokens(staged, train_ids, held_out_ids, chosen))


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
