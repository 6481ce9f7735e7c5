"""Which model writes, and after what? A random Llama whose random gates drop what is asked, or a trained model on text
it has never read."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ctxprune import GateConfig, checkpoint
from ctxprune.checkpoint import model_folder
from ctxprune.errors import UserError
from ctxprune.generation.prompts import page_bytes
from ctxprune.packing import pack
from ctxprune.policies import PolicyConfig
from ctxprune.retrofitting import gate_parameters, retrofit, state_of
from ctxprune.text.batches import held_out_batches
from ctxprune.text.token_store import TokenSplit, read_tokens
from pipelines.config import Config, GenerationConfig
from pipelines.evaluate import as_trained, corpus_for
from pipelines.generation_benchmark.calibration import random_gates
from pipelines.generation_benchmark.clock import WARM_UP
from pipelines.progress import Bars

SEED = 0
PAGE = 64
"""Slots per page, as the batcher has them."""
RANDOM = "random lifetimes, for timing only"
"""What every record of a random model says of its gates."""


@dataclass
class Subject:
    """The same weights twice: as transformers has them, and retrofitted."""

    twin: PreTrainedModel
    """Never retrofitted."""
    pruned: dict[float | None, PreTrainedModel]
    """By the share that its gates shall drop; None: what it has learned."""
    gates: str
    """Where the gates' decisions come from."""
    held_out: TokenSplit | None = None
    """Text to read; None: random tokens."""

    def prompts(self, batch: int, length: int) -> Int[Tensor, "batch length"]:
        """Rows of text, each taken as one document."""
        device = self.twin.device
        if self.held_out is None:
            generator = torch.Generator().manual_seed(SEED)
            return torch.randint(self.twin.config.vocab_size, (batch, length), generator=generator).to(device)
        rows = torch.cat([some.input_ids for some in held_out_batches(self.held_out, batch, length, 10**9)])
        # Few held-out rows are repeated: speed does not mind.
        return rows[torch.arange(batch) % len(rows)].to(device)


def opened(config: Config, overrides: list[str], device: torch.device) -> Subject:
    """The model to measure. Raises UserError for contexts, a pool or a checkpoint that do not fit, before anything is
    written."""
    settings = config.generation
    if settings.checkpoint is None:
        subject = random_subject(settings, device)
        _refuse(settings, next(iter(subject.pruned.values())))
        return _packed(subject, settings)
    folder = model_folder(Path(settings.checkpoint))
    model = checkpoint.load(folder, device=device)
    _refuse(settings, model)
    with Bars() as bars:
        text = read_tokens(corpus_for(as_trained(config, overrides, folder), folder, bars)).held_out
    longest = max(settings.contexts)
    if len(text.tokens) < longest:
        raise UserError(f"held-out text has {len(text.tokens)} tokens, fewer than generation.contexts={longest}")
    return _packed(Subject(twin_of(model), {None: model}, "trained", text), settings)


def _packed(subject: Subject, settings: GenerationConfig) -> Subject:
    """Ours multiply by packed weights, pruned and dense alike."""
    if settings.packed and subject.twin.device.type == "cpu":
        for model in subject.pruned.values():
            pack(model)
    return subject


def random_subject(settings: GenerationConfig, device: torch.device) -> Subject:
    """A Llama of the sizes asked for; its gates still have to be calibrated on what they will read."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=settings.vocab, hidden_size=settings.width, intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads, num_key_value_heads=settings.kv_heads,
        max_position_embeddings=tokens_fed(settings, max(settings.contexts)), tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    twin = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device).eval()
    pruned: dict[float | None, PreTrainedModel] = {}
    for drop in settings.drops:
        pruned[drop] = retrofitted(twin, GateConfig(rank=settings.rank))
        random_gates(pruned[drop], SEED)
    return Subject(twin, pruned, RANDOM)


def retrofitted(twin: PreTrainedModel, policy: PolicyConfig) -> PreTrainedModel:
    """A retrofitted model beside its twin, on the same tensors of weights."""
    shared = {id(parameter): parameter for parameter in twin.parameters()}
    return retrofit(copy.deepcopy(twin, shared), policy).eval()


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it was before it was retrofitted, on the same tensors of weights."""
    config = copy.deepcopy(model.config)
    twin = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation="sdpa")
    weights = {
        name.replace(".inner.", "."): tensor for name, tensor in model.state_dict().items() if ".rule." not in name
    }
    twin.load_state_dict(weights, assign=True)
    twin.tie_weights()
    return twin.to(model.device).eval()


def tokens_fed(settings: GenerationConfig, context: int) -> int:
    """Positions that a row of this context takes."""
    return context + WARM_UP + settings.new_tokens


def weight_bytes(model: PreTrainedModel, gated: bool) -> int:
    """Bytes of the weights that a step reads: all but the gates where they are bypassed, and an embedding of which it
    reads a row per token."""
    gates = {id(p) for p in gate_parameters(model)}
    left_out = set() if gated else gates
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is None or head.weight.data_ptr() != embedding.data_ptr():
        left_out = left_out | {id(embedding)}
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in left_out)


def _refuse(settings: GenerationConfig, model: PreTrainedModel) -> None:
    """UserError for contexts beyond the model's positions, and for a pool that does not hold one request."""
    longest = max(settings.contexts)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and tokens_fed(settings, longest) > positions:
        raise UserError(
            f"generation.contexts holds {longest}: with {settings.new_tokens} new tokens and {WARM_UP} to warm up that "
            f"is more than the model's {positions} positions; lower it, or generation.new_tokens"
        )
    whole = -(-(longest + settings.new_tokens) // PAGE) * page_bytes(model, PAGE) * state_of(model).layers
    if 0 < settings.pool_gb * 1e9 < whole:
        raise UserError(
            f"generation.pool_gb={settings.pool_gb}: one request of {longest + settings.new_tokens} tokens may need "
            f"{whole / 1e9:.3g} GB, give more"
        )
