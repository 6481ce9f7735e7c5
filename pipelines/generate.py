"""What does a saved model write? One prompt continued, and how much of its context was still alive at the end, or how
many of its drafts were accepted."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

import ctxprune
from ctxprune.checkpoint import model_folder
from ctxprune.text import tokenizer
from pipelines import output
from pipelines.config import Config, GenerateConfig
from pipelines.machine import device
from pipelines.progress import Bars


def main(config: Config, overrides: list[str]) -> int:
    """The verb: the continuation on stdout."""
    asked = config.generate
    folder = model_folder(Path(asked.checkpoint))
    words = tokenizer.load_tokenizer(str(folder))
    ids = words.encode(asked.prompt, add_special_tokens=False)
    prompt = torch.tensor([tokenizer.document_start_id(words), *ids])
    model, counted = ctxprune.load(folder, device=device()), itertools.count(1)
    how = {name: getattr(asked, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed")}
    with Bars() as bars, bars.task("tokens", asked.max_new_tokens) as advance:
        how |= {"eos_token_id": words.eos_token_id, "on_token": lambda row, token: advance(next(counted))}
        tokens, facts, note = (_lossless if asked.lossless else _pruned)(model, prompt, asked, how)
    text = words.decode(tokens.tolist(), skip_special_tokens=True)
    record = {"checkpoint": str(folder), "prompt": asked.prompt, "text": text, "new_tokens": len(tokens), **facts}
    shown = f"{asked.prompt}{text}\n\n{note}"
    output.emit(record, config.format, shown)
    return 0


def _pruned(model, prompt: torch.Tensor, asked: GenerateConfig, how: dict) -> tuple[torch.Tensor, dict, str]:
    """New tokens, what a record says of them, and the same for people."""
    alarm = None if asked.alarm_share is None else ctxprune.Alarm(asked.alarm_share)
    written = ctxprune.generate(model, [prompt], max_live_tokens=asked.max_live_tokens, alarm=alarm, **how)
    seen, alive = len(prompt) + len(written.tokens[0]) - 1, written.live_tokens[0]
    facts = {"context_tokens": seen, "live_tokens": alive, "dropped": 1.0 - alive / seen}
    note = f"[{alive:.1f} of {seen} context tokens still alive per layer: {facts['dropped']:.0%} dropped]"
    return written.tokens[0], facts, note


def _lossless(model, prompt: torch.Tensor, asked: GenerateConfig, how: dict) -> tuple[torch.Tensor, dict, str]:
    """The same of the dense model's text, which the pruned one drafted."""
    written = ctxprune.generate_lossless(model, [prompt], **how)
    facts = {"drafted": written.drafted, "accepted": written.accepted, "passes": written.passes}
    note = (
        f"[the dense model's text: {written.accepted} of {written.drafted} drafts accepted in {written.passes} passes]"
    )
    return written.tokens[0], facts, note
