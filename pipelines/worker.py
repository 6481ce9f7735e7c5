"""What does one DeepSpeed process do with a job?

Train (unless that is done), save, evaluate: a plain function of the job.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from ctxprune import checkpoint
from ctxprune.budget import calibrate
from ctxprune.evaluation import evaluate
from ctxprune.retrofitting import parameter_counts, retrofit, set_alpha
from ctxprune.text.batches import held_out_batches
from ctxprune.text.token_store import TokenStore, read_tokens
from ctxprune.text.tokenizer import document_start_id
from pipelines import store, training
from pipelines.config import Config, from_record
from pipelines.machine import device
from pipelines.models import calibration, from_scratch, policy_for, pretrained
from pipelines.prepare import text_fingerprint

METRICS = "metrics.jsonl"


@dataclasses.dataclass
class Job:
    """All a worker needs, as plain values: it crosses process and machine borders as JSON."""

    kind: str
    """base (a language model from scratch) or train (a trial)."""
    config: dict[str, Any]
    store: str
    data: str
    """Folder of the tokenised corpus."""
    base: str | None
    """Pretrained model of a trial: folder or hub id."""
    inputs: dict[str, Any]
    """What the training step's output depends on."""
    evaluate_inputs: dict[str, Any] | None = None
    """What the evaluation's output depends on; None for base models."""

    @property
    def folder(self) -> Path:
        """Where the training step's output will lie."""
        return store.folder_of(Path(self.store), self.kind, self.inputs)

    @property
    def evaluation(self) -> Path | None:
        """Where the evaluation's output will lie."""
        if self.evaluate_inputs is None:
            return None
        return store.folder_of(Path(self.store), "evaluate", self.evaluate_inputs)


def work(job: Job) -> None:
    """Run a job in this process of an initialised process group. Rank 0 writes; every rank trains."""
    config, tokens = from_record(job.config), read_tokens(Path(job.data))
    # Asked before anyone writes, so that all ranks agree.
    train = not store.finished(job.folder)
    if dist.get_world_size() > 1:
        dist.barrier()
    if dist.get_rank() > 0:
        if train:
            _train(job, config, tokens, None)
        return
    if train:
        store.ensure(Path(job.store), job.kind, job.inputs, lambda staged: _train(job, config, tokens, staged))
    if job.evaluate_inputs is not None:
        store.ensure(Path(job.store), "evaluate", job.evaluate_inputs, lambda staged: _evaluate(job, tokens, staged))


def _train(job: Job, config: Config, tokens: TokenStore, staged: Path | None) -> None:
    start = time.monotonic()
    build = _base_model if job.kind == "base" else _retrofitted
    model = build(job, config, tokens)
    plan = training.base_plan(config) if job.kind == "base" else training.trial_plan(config)
    teacher = None
    if plan.pruning.distillation > 0:
        teacher = pretrained(job.base, config.train.context, tokens).eval().requires_grad_(False)
    weights = training.run(model, teacher, config, plan, tokens.train, staged / METRICS if staged else None)
    if staged is None:
        return
    # A fresh copy takes the weights: what DeepSpeed made of the live one (partitions, bfloat16) is its own affair.
    final = build(job, config, tokens)
    final.load_state_dict(weights, strict=True)
    final.eval().to(device())
    counts = parameter_counts(final)
    notes: dict[str, Any] = {
        "parameters": counts["backbone"],
        "gate_parameters": counts["gates"],
        "train_tokens": plan.steps * config.train.batch * config.train.context,
    }
    tokenizer = AutoTokenizer.from_pretrained(Path(job.data) / "tokenizer")
    if job.kind == "base":
        final.save_pretrained(staged / "model")
        tokenizer.save_pretrained(staged / "model")
    else:
        if plan.gated:
            set_alpha(final, plan.pruning.alpha_end)
            if plan.pruning.sparsity is not None:
                notes["beta_shift"] = calibrate(final, calibration(config, tokens), plan.pruning.sparsity)
        stored = final.to(torch.bfloat16) if config.engine.dtype == "bfloat16" else final
        known = {"tokenizer_fingerprint": tokens.tokenizer_fingerprint}
        known |= {"text_fingerprint": text_fingerprint(Path(job.data))}
        checkpoint.save(stored, staged / "model", tokenizer, config=job.config, **known)
    notes["seconds"] = time.monotonic() - start
    store.write_json(staged / "training.json", notes)


def _base_model(job: Job, config: Config, tokens: TokenStore):
    tokenizer = AutoTokenizer.from_pretrained(Path(job.data) / "tokenizer")
    start_id = document_start_id(tokenizer)
    return from_scratch(config.model, tokens.vocab_size, start_id, config.train.context, config.train.seed)


def _retrofitted(job: Job, config: Config, tokens: TokenStore):
    model = pretrained(job.base, config.train.context, tokens)
    torch.manual_seed(config.train.seed)
    retrofit(model, policy_for(config, model.config.num_hidden_layers, tokens))
    if config.engine.dtype == "bfloat16":
        # Weights are kept in float32 by the optimizer; the gates follow the backbone when DeepSpeed casts both.
        model.float()
    return model


def _evaluate(job: Job, tokens: TokenStore, staged: Path) -> None:
    start, config = time.monotonic(), from_record(job.config)
    model = checkpoint.load(job.folder / "model", device=device())
    settings = config.evaluate
    batches = list(held_out_batches(tokens.held_out, settings.batch, config.train.context, settings.tokens))

    def progress(done: int) -> None:
        with (staged / METRICS).open("a") as file:
            file.write(json.dumps({"kind": "evaluate", "step": done - 1, "steps": len(batches)}) + "\n")

    outcome = dataclasses.asdict(evaluate(model, batches, settings.contexts, progress))
    store.write_json(staged / "evaluation.json", outcome | {"seconds": time.monotonic() - start})
