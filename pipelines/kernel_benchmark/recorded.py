"""Which tensors does a trained model's attention meet? A checkpoint reads text, and each layer's arguments are kept.

transformers calls attention by name, so a model that is told another name calls a function of ours, which keeps the
arguments and goes on as the project's own would. Its gates drop as the step function says: deeper layers see what they
see in use. Text is Python's standard library, which models trained from scratch here have partly learned from.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ctxprune import attention, checkpoint, kernels
from ctxprune.calls import Hard, Soft
from ctxprune.checkpoint import model_folder
from ctxprune.errors import UserError
from ctxprune.retrofitting import mode, state_of, wrappers
from ctxprune.text.corpus import stdlib_documents
from ctxprune.text.tokenizer import encode_documents, load_tokenizer
from pipelines.config import KernelsConfig
from pipelines.kernel_benchmark.problem import Case, Problem

NAME = "ctxprune-recording"
"""The attn_implementation that keeps what it is called with."""
BYTES_PER_TOKEN = 16
"""Of text read, more than any tokenizer needs on average."""


def opened(settings: KernelsConfig, device: torch.device) -> tuple[PreTrainedModel, Tensor]:
    """The checkpoint's model in its own precision, and rows of text as long as its largest context."""
    folder = model_folder(Path(settings.checkpoint or ""))
    model = checkpoint.load(folder, device=device)
    rows = max(settings.batch, settings.decode_batch, 2)
    return model, text(folder, rows, model.config.max_position_embeddings).to(device)


def text(folder: Path, rows: int, length: int) -> Tensor:
    """Token ids (rows, length), one file behind the other; each row is taken as one document."""
    documents = stdlib_documents(BYTES_PER_TOKEN * rows * length)
    ids = torch.cat([torch.from_numpy(one) for one in encode_documents(load_tokenizer(str(folder)), documents)])
    whole = len(ids) // length
    if not whole:
        raise UserError(f"the standard library has {len(ids)} tokens for {folder}, fewer than its context of {length}")
    # Few rows are repeated: speed does not mind.
    return ids[: whole * length].view(whole, length)[torch.arange(rows) % whole].long()


def cases(settings: KernelsConfig, lengths: list[int], model: PreTrainedModel, tokens: Tensor) -> list[Case]:
    """Every layer in turn, over the first tokens of each row; all of a row's tokens are at hand for decoding too, so
    its caches hold one less."""

    def case(layer: int, length: int) -> Case:
        def problem(operation: str) -> Problem:
            rows = settings.decode_batch if operation == "decoding" else settings.batch
            found = recorded(model, tokens[:rows, :length], layer)
            return found.to(tokens.device, getattr(torch, settings.dtype))

        return Case({"layer": layer}, problem)

    return [case(layer, length) for length in lengths for layer in range(len(wrappers(model)))]


@torch.no_grad()
def recorded(model: PreTrainedModel, ids: Tensor, layer: int) -> Problem:
    """What one layer's attention is called with in a pass over ids (rows, n), each row a document.

    Raises UserError where a layer's drops are not those of its own gates.
    """
    refuse_others(model)
    kept: list[Problem] = []

    def record(module, query, key, value, attention_mask, scaling=None, pruning: Soft | None = None, **rest):
        assert pruning is not None, "in soft mode every layer says what its gates are"
        gates = (pruning.interaction_query, pruning.interaction_key, pruning.beta)
        times = kernels.drop_times(*gates, guard=pruning.guard, end=pruning.end)
        if module.layer_idx == layer:
            # Peers divide by the root of the width; what the model does instead goes into the queries.
            factor = 1.0 if scaling is None else scaling * query.shape[-1] ** 0.5
            kept.append(Problem(query * factor, key, value, *gates, pruning.alpha, pruning.guard, pruning.end))
        hard = Hard(times) if bool((times < query.shape[2]).any()) else None
        output, _ = attention.attention(
            module, query, key, value, attention_mask, scaling=scaling, pruning=hard, **rest
        )
        return output, times.new_zeros(len(times))

    AttentionInterface.register(NAME, record)
    AttentionMaskInterface.register(NAME, attention.padding_only)
    model.set_attn_implementation(NAME)
    try:
        with mode(model, "soft"):
            model(ids, use_cache=False)
    finally:
        model.set_attn_implementation(attention.NAME)
    (found,) = kept
    return found


def refuse_others(model: PreTrainedModel) -> None:
    """UserError unless every layer has gates whose drops are its own."""
    if any(wrapper.rule.gate is None for wrapper in wrappers(model)):
        raise UserError("kernels.checkpoint: its layers have no gates; give a model of pruning.policy=learned")
    if state_of(model).propagate_in_depth:
        raise UserError("kernels.checkpoint: with pruning.propagate_in_depth a layer's drops are not its gates' alone")
