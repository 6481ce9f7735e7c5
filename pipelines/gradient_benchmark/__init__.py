"""What is pruning by gradients worth, and what does it cost? Its agreement with leaving keys out, and its time beside
a plain pass over the prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

import ctxprune
from ctxprune import checkpoint
from ctxprune.checkpoint import model_folder
from ctxprune.errors import UserError
from ctxprune.text.batches import held_out_batches
from ctxprune.text.token_store import TokenSplit, read_tokens
from pipelines import output
from pipelines.config import Config, GradientsConfig
from pipelines.evaluate import as_trained, corpus_for, refuse_changed
from pipelines.gradient_benchmark import cost, lines, worth
from pipelines.grid import Trial
from pipelines.machine import machine, versions
from pipelines.models import pretrained
from pipelines.prepare import Corpora
from pipelines.progress import Bars

log = logging.getLogger(__name__)


@dataclass
class Subject:
    """A retrofitted model and text that it has not been trained on."""

    name: str
    model: PreTrainedModel
    held_out: TokenSplit

    def rows(self, count: int, length: int) -> Int[Tensor, "rows length"]:
        """At most `count` windows spread evenly over the text, each taken as one document."""
        batches = held_out_batches(self.held_out, count, length, count * length)
        return torch.cat([batch.input_ids for batch in batches]).to(self.model.device)


def main(config: Config, overrides: list[str]) -> int:
    """The verb's target: a record per score and number of queries, then one per length and number of queries."""
    settings = config.gradients
    with Bars() as bars:
        subject = opened(config, overrides, bars)
    about: dict[str, object] = {"model": subject.name, "gradients": vars(settings)}
    about |= {"parameters": sum(p.numel() for p in subject.model.parameters()), "device": subject.model.device.type}
    about |= {"threads": torch.get_num_threads(), "machine": machine(), "versions": versions()}
    for record in records(subject, settings, config.benchmark.repeats):
        output.emit(record | about, config.format, lines.line(record))
    return 0


def records(subject: Subject, settings: GradientsConfig, repeats: int) -> Iterator[dict[str, object]]:
    """All that is asked for. UserError, before any work, where the model or the text is too short for it."""
    lengths = _fitting(subject, settings)
    if "worth" in settings.parts:
        ids = subject.rows(settings.windows, settings.context + max(settings.queries))
        for queries in sorted(set(settings.queries)):
            yield from worth.records(subject.model, ids[:, : settings.context + queries], settings.context)
    for length in lengths:
        yield from cost.records(subject.model, subject.rows(settings.batch, length), settings.queries, repeats)


def opened(config: Config, overrides: list[str], bars: Bars) -> Subject:
    """The model of checkpoint=FOLDER with its own text, or the one of model.path with the text of data."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.generate.checkpoint:
        folder = model_folder(Path(config.generate.checkpoint))
        text = corpus_for(as_trained(config, overrides, folder), folder, bars)
        refuse_changed(text, folder, overrides)
        # The name of a trial, whose model lies in train/model, says more than "model".
        return Subject(_name(folder), checkpoint.load(folder, device=device), read_tokens(text).held_out)
    tokens = read_tokens(Corpora([Trial("", config, [])], bars).folder(config))
    model = pretrained(str(config.model.path), 1, tokens)
    return Subject(
        config.model.name, ctxprune.retrofit(model, ctxprune.DenseConfig()).to(device).eval(), tokens.held_out
    )


def _name(folder: Path) -> str:
    return next((part for part in reversed(folder.parts) if part not in ("model", "train")), folder.name)


def _fitting(subject: Subject, settings: GradientsConfig) -> list[int]:
    """The lengths to be timed, rising: those that the model has positions for. UserError where nothing fits."""
    positions = getattr(subject.model.config, "max_position_embeddings", None) or 10**9
    text, queries = len(subject.held_out.tokens), max(settings.queries)
    needed = settings.context + queries
    if "worth" in settings.parts and needed > min(positions, text):
        has = f"the model has {positions} positions" if positions < needed else f"held-out text has {text} tokens"
        raise UserError(f"gradients.context + gradients.queries = {needed}, but {has}: lower one of them")
    if "cost" not in settings.parts:
        return []
    lengths = sorted(set(settings.lengths))
    fitting = [length for length in lengths if length <= min(positions, text)]
    if not fitting:
        has = f"the model has {positions} positions" if positions < lengths[0] else f"held-out text has {text} tokens"
        raise UserError(f"gradients.lengths begins at {lengths[0]}, but {has}: add a smaller one")
    for length in lengths[len(fitting) :]:
        log.info("gradients.lengths: %d is left out, beyond the model's positions or the held-out text", length)
    return fitting
