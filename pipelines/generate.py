"""What does a saved model write? One prompt continued, and how much of its context was still alive at the end."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

import ctxprune
from ctxprune import tokenizer
from pipelines import output
from pipelines.config import Config
from pipelines.models import trained
from pipelines.progress import Bars


def main(config: Config, overrides: list[str]) -> int:
    """The verb: the continuation on stdout."""
    asked = config.generate
    folder = trained(Path(asked.checkpoint))
    words = tokenizer.load_tokenizer(str(folder))
    ids = words.encode(asked.prompt, add_special_tokens=False)
    prompt = torch.tensor([tokenizer.document_start_id(words), *ids])
    model, counted = ctxprune.load(folder), itertools.count(1)
    with Bars() as bars, bars.task("tokens", asked.max_new_tokens) as advance:
        written = ctxprune.generate(
            model,
            [prompt],
            max_new_tokens=asked.max_new_tokens,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            seed=asked.seed,
            eos_token_id=words.eos_token_id,
            on_token=lambda row, token: advance(next(counted)),
        )
    text = words.decode(written.tokens[0].tolist(), skip_special_tokens=True)
    seen = len(prompt) + len(written.tokens[0]) - 1
    alive = written.live_tokens[0]
    record = {
        "checkpoint": str(folder),
        "prompt": asked.prompt,
        "text": text,
        "new_tokens": len(written.tokens[0]),
        "context_tokens": seen,
        "live_tokens": alive,
        "dropped": 1.0 - alive / seen,
    }
    note = f"[{alive:.1f} of {seen} context tokens still alive per layer: {record['dropped']:.0%} dropped]"
    shown = f"{asked.prompt}{text}\n\n{note}"
    output.emit(record, config.format, shown)
    return 0
