"""How does an encoder learn to classify, and to do so with fewer tokens? From scratch on short pieces, once; then on
whole rows, each method from the same weights, on the same rows, in as many steps.

Every result is kept under the hash of what went into it: a second start finds it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForTokenClassification

from ctxprune.hidden_pruning import prune_hidden, release_hidden
from ctxprune.text.batches import IGNORED
from pipelines import store
from pipelines.benchmark_config import HiddenConfig
from pipelines.hidden_benchmark.entities import counted
from pipelines.hidden_benchmark.flops import EXPANSION
from pipelines.hidden_benchmark.method import Method
from pipelines.hidden_benchmark.rows import Rows

FORMAT = 1
"""Raised when a step's output would differ for the same inputs."""
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; it then falls linearly to the end."""
JUDGED_TOGETHER = 8
"""Rows per pass when accuracy is measured."""
Advance = Callable[[int], None]
Drawn = tuple[Tensor, Tensor | None, Tensor]
"""Token ids [batch, n], their positions in the row [batch, n] (None: 0, 1, ...) and classes [batch], or
[batch, n] where words have tags."""


def base_inputs(settings: HiddenConfig, rows: Rows) -> dict:
    """What the model trained from scratch depends on."""
    names = ("layers", "width", "heads", "base_tokens", "base_steps", "base_batch", "base_learning_rate", "seed")
    asked = {name: getattr(settings, name) for name in names}
    return {"format": FORMAT, "rows": rows.inputs, **asked}


def method_inputs(settings: HiddenConfig, rows: Rows, method: Method) -> dict:
    """What a method's fine-tuned model depends on: not its name, so that what is the same is trained once."""
    pruning = dataclasses.asdict(method.pruning) if method.pruning and method.trained else None
    how = {name: getattr(settings, name) for name in ("steps", "batch", "learning_rate")}
    return {"format": FORMAT, "base": base_inputs(settings, rows), "tokens": method.tokens, "pruning": pruning, **how}


def base(root: Path, settings: HiddenConfig, rows: Rows, advance: Advance) -> Path:
    """The folder of the model trained from scratch."""

    def make(staged: Path) -> None:
        torch.manual_seed(settings.seed)
        model = BertForTokenClassification._from_config(
            _config(settings, rows), attn_implementation="sdpa", dtype=torch.float32
        )
        peak, draw = settings.base_learning_rate, lambda step: pieces(settings, rows, step)
        _kept(staged, model, train(model, draw, settings.base_steps, peak, advance))

    return store.ensure(root, "hidden-base", base_inputs(settings, rows), make)


def fine_tuned(root: Path, settings: HiddenConfig, rows: Rows, method: Method, start: Path, advance: Advance) -> Path:
    """The folder of the method's model: that of dense where it is not trained under its own pruning."""

    def make(staged: Path) -> None:
        model = loaded(start, method if method.trained else None)
        peak, draw = settings.learning_rate, lambda step: whole(settings, rows, step, method.tokens)
        losses = train(model, draw, settings.steps, peak, advance)
        _kept(staged, release_hidden(model) if method.pruning and method.trained else model, losses)

    return store.ensure(root, "hidden-model", method_inputs(settings, rows, method), make)


def right(
    root: Path, settings: HiddenConfig, rows: Rows, method: Method, folder: Path, advance: Advance
) -> Float[Tensor, "rows ..."]:
    """1 for each row of the split judged on that the method classifies rightly, else 0; of tags what was `counted`."""

    def make(staged: Path) -> None:
        found = judged(loaded(folder, method), rows, settings.judged_on, method.tokens, advance)
        store.write_json(staged / "right.json", found.int().tolist())

    pruning = dataclasses.asdict(method.pruning) if method.pruning else None
    inputs = {"model": method_inputs(settings, rows, method), "pruning": pruning, "split": settings.judged_on}
    made = store.ensure(root, "hidden-right", {"format": FORMAT, **inputs}, make)
    return torch.tensor(json.loads((made / "right.json").read_text())).float()


def loaded(folder: Path, method: Method | None) -> BertForTokenClassification:
    """A kept model in eval mode, pruned as the method says."""
    model = BertForTokenClassification.from_pretrained(
        folder / "model", attn_implementation="sdpa", dtype=torch.float32
    ).eval()
    return prune_hidden(model, method.pruning) if method and method.pruning else model


def pieces(settings: HiddenConfig, rows: Rows, step: int) -> Drawn:
    """Parts of random rows, each behind its row's opening token and told its place, so that every position is learned
    without the cost of whole rows."""
    ids, classes = rows.ids["train"], rows.classes["train"]
    generator = np.random.default_rng([settings.seed, 0, step])
    size, most = settings.base_tokens, settings.tokens
    row = torch.from_numpy(generator.integers(len(ids), size=(settings.base_batch, 1)))
    begin = torch.from_numpy(generator.integers(1, most - size + 2, size=(settings.base_batch, 1)))
    column = torch.cat([torch.zeros_like(begin), begin + torch.arange(size - 1)], 1)
    return ids[row, column], column, classes[row, column] if classes.ndim > 1 else classes[row[:, 0]]


def whole(settings: HiddenConfig, rows: Rows, step: int, tokens: int) -> Drawn:
    """The first tokens of the step's rows, which are the same for every method; an epoch visits each row once."""
    ids, classes = rows.ids["train"], rows.classes["train"]
    visits = step * settings.batch + np.arange(settings.batch)
    orders = {
        epoch: np.random.default_rng([settings.seed, 1, epoch]).permutation(len(ids))
        for epoch in set((visits // len(ids)).tolist())
    }
    row = torch.tensor([orders[visit // len(ids)][visit % len(ids)] for visit in visits.tolist()])
    return ids[row, :tokens], None, classes[row, :tokens] if classes.ndim > 1 else classes[row]


def train(
    model: BertForTokenClassification, draw: Callable[[int], Drawn], steps: int, peak: float, advance: Advance
) -> list[float]:
    """AdamW on the cross-entropy of rows' classes or words' tags; the loss of each step, in nats. The model ends in
    eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    rising, losses = max(1, round(WARM_UP * steps)), []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / rising, (steps - step) / max(1, steps - rising))
        ids, positions, classes = draw(step)
        if classes.ndim > 1:
            told = model(input_ids=ids, position_ids=positions).logits
            # Rows may hold no tag that counts: their mean would be no number.
            lost = cross_entropy(told.flatten(0, 1), classes.flatten(), ignore_index=IGNORED, reduction="sum")
            loss = lost / (classes != IGNORED).sum().clamp(min=1)
        else:
            loss = cross_entropy(said(model, ids, positions), classes)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        advance(step + 1)
    model.eval()
    return losses


def said(model, ids: Int64[Tensor, "batch n"], positions: Tensor | None = None) -> Float[Tensor, "batch classes"]:
    """What a model says of each row: the mean of what its tokens say, those that left the stream in the state in which
    they left. (Read off the opening token instead, from scratch, no loss fell in 200 steps.)"""
    return model(input_ids=ids, position_ids=positions).logits.mean(1)


@torch.inference_mode()
def judged(model, rows: Rows, split: str, tokens: int, advance: Advance) -> Float[Tensor, "rows ..."]:
    """1 for each row of the split whose class the model says, else 0; where words have tags what was `counted`."""
    found: list[Tensor] = []
    for ids, classes in zip(
        rows.ids[split].split(JUDGED_TOGETHER), rows.classes[split].split(JUDGED_TOGETHER), strict=True
    ):
        if classes.ndim > 1:
            told = model(input_ids=ids[:, :tokens]).logits.argmax(-1)
            rights = [counted(*row, rows.labels) for row in zip(ids, classes, told, strict=True)]
            found.append(torch.tensor(rights).float())
        else:
            found.append((said(model, ids[:, :tokens]).argmax(-1) == classes).float())
        advance(len(found) * JUDGED_TOGETHER)
    return torch.cat(found)


def _config(settings: HiddenConfig, rows: Rows) -> BertConfig:
    return BertConfig(
        vocab_size=rows.vocab_size,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=EXPANSION * settings.width,
        max_position_embeddings=settings.tokens,
        num_labels=len(rows.labels),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,
    )


def _kept(staged: Path, model: BertForTokenClassification, losses: list[float]) -> None:
    model.save_pretrained(staged / "model")
    tail = losses[-max(1, len(losses) // 10) :]
    store.write_json(staged / "training.json", {"loss": sum(tail) / len(tail), "losses": losses})
