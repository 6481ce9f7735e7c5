"""How good is a saved model on held-out text? Its own by default, another text with data=..."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ctxprune import checkpoint
from ctxprune.checkpoint import model_folder
from ctxprune.errors import UserError
from ctxprune.evaluation import evaluate
from ctxprune.text import tokenizer
from ctxprune.text.batches import held_out_batches
from ctxprune.text.token_store import read_tokens
from pipelines import output
from pipelines.config import Config
from pipelines.grid import Trial
from pipelines.machine import device, machine, versions
from pipelines.models import refuse_long
from pipelines.prepare import Corpora, text_fingerprint
from pipelines.progress import Bars


def main(config: Config, overrides: list[str]) -> int:
    """The verb: one record on stdout."""
    folder = model_folder(Path(config.generate.checkpoint))
    config = as_trained(config, overrides, folder)
    with Bars() as bars:
        data = corpus_for(config, folder, bars)
        refuse_changed(data, folder, overrides)
        tokens = read_tokens(data)
        model = checkpoint.load(folder, device=device())
        refuse_long(model, config.train.context, "train.context")
        settings = config.evaluate
        batches = list(held_out_batches(tokens.held_out, settings.batch, config.train.context, settings.tokens))
        with bars.task("evaluating (batches)", len(batches)) as advance:
            outcome = dataclasses.asdict(evaluate(model, batches, settings.contexts, advance))
    record = {"checkpoint": str(folder), **outcome, "machine": machine(), "versions": versions()}
    output.emit(record, config.format, _text(record))
    return 0


def as_trained(config: Config, overrides: list[str], folder: Path) -> Config:
    """The config with the checkpoint's own data and context, but for what the command line names: another text, or how
    its own is read. UserError for contexts it names that are longer."""
    own = checkpoint.read_pruning(folder).get("config")
    named = {word.partition("=")[0] for word in overrides}
    changes: dict[str, Any] = {}
    if own and not names_data(overrides):
        read = {name for name in own["data"] if f"data.{name}" in named}
        changes["data"] = type(config.data)(**own["data"] | {name: getattr(config.data, name) for name in read})
    if own and "train.context" not in named:
        changes["train"] = dataclasses.replace(config.train, context=own["train"]["context"])
    config = dataclasses.replace(config, **changes)
    contexts = [c for c in config.evaluate.contexts if c <= config.train.context]
    if "evaluate.contexts" in named and contexts != config.evaluate.contexts:
        longest = f"evaluate.contexts holds {max(config.evaluate.contexts)}"
        raise UserError(f"{longest}, above train.context={config.train.context}: use evaluate.contexts={contexts}")
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, contexts=contexts))


def names_data(overrides: list[str]) -> bool:
    """Whether the command line says which text is meant, not only how it is read."""
    return any(word.partition("=")[0] in ("data", "data.source", "data.path", "data.names") for word in overrides)


def corpus_for(config: Config, folder: Path, bars: Bars) -> Path:
    """The tokenised text a saved model is measured on, made with the tokenizer that was saved with it."""
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise UserError(
            f"{folder} holds no tokenizer: save the model with one, ctxprune.save(model, folder, tokenizer)"
        )
    wanted = checkpoint.read_pruning(folder).get("tokenizer_fingerprint")
    own = tokenizer.fingerprint(tokenizer.load_tokenizer(str(folder)))
    if wanted is not None and wanted != own:
        raise UserError(f"the tokenizer in {folder} is not the one its model was trained with: restore it")
    with_tokenizer = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder)))
    return Corpora([Trial("", with_tokenizer, [])], bars).folder(with_tokenizer)


def refuse_changed(data: Path, folder: Path, overrides: list[str]) -> None:
    """UserError where a model would be judged on its own data, which is not what it was: of another text other
    documents are held out, and it may have learned them. Nothing for text that the command line names."""
    trained_on = checkpoint.read_pruning(folder).get("text_fingerprint")
    if not names_data(overrides) and trained_on is not None and trained_on != text_fingerprint(data):
        raise UserError(
            f"the text that {folder} was trained on has changed, or is read in another way, and it may have learned "
            "what is held out now: restore it, or name what to judge on, e.g. data=files data.path=FILE"
        )


def _text(record: dict) -> str:
    lines = [f"{record['checkpoint']}, {record['tokens']:,} held-out tokens, step function:"]
    lines.append(f"  perplexity     {record['perplexity']:.4f}")
    if record["perplexity_soft"] is not None:
        lines.append(f"  with soft gates {record['perplexity_soft']:.4f}")
    lines.append(f"  dropped        {record['sparsity']:.4f} of the context")
    lines.append("  per layer      " + " ".join(f"{share:.3f}" for share in record["sparsity_per_layer"]))
    for context, value in record["perplexity_at"].items():
        dropped = record["sparsity_at"][context]
        if value is not None and dropped is not None:
            lines.append(f"  at context {context:>5}: perplexity {value:.4f}, dropped {dropped:.4f}")
    return "\n".join(lines)
