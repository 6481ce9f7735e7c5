"""What would a full pass say in which dropped tokens are only masked? The models, batches and reference of the tests of
hidden-state pruning.

Those tests import ctxprune's part from here: it is loaded with its shapes checked.
"""

from __future__ import annotations

import inspect

import torch
import transformers as tf
from torch import nn

from ctxprune import hidden_pruning
from ctxprune.hidden_pruning import HiddenPruningConfig, dense, prune_hidden, pruning_of, release_hidden
from ctxprune.hidden_pruning import layer as hidden_layer
from ctxprune.hidden_pruning import stream as hidden_stream
from ctxprune.hidden_pruning.stream import Stream
from tests.models import FAMILIES, GROUPED, LAYERS, VOCAB, small_model, tokens

__all__ = ["HiddenPruningConfig", "Stream", "dense", "hidden_layer", "hidden_stream", "prune_hidden", "pruning_of"]
__all__ += ["release_hidden"]

BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 130,
    "num_labels": 5,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MODERN = {key: value for key, value in BERT.items() if "dropout" not in key}
MODERN |= {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}
DECODERS = {
    **FAMILIES,
    "gemma3-mixed": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GROUPED, head_dim=8, **MIXED)),
    "llama-text": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**{**GROUPED, "pad_token_id": 1})),
}
DISTIL = {"vocab_size": VOCAB, "dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 64, "num_labels": 5}
ENCODERS = {
    "bert-words": lambda: tf.BertForTokenClassification(tf.BertConfig(**BERT)),
    "bert-text": lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT)),
    "roberta-words": lambda: tf.RobertaForTokenClassification(tf.RobertaConfig(**BERT)),
    "electra-words": lambda: tf.ElectraForTokenClassification(tf.ElectraConfig(**BERT, embedding_size=32)),
    "modernbert-words": lambda: tf.ModernBertForTokenClassification(tf.ModernBertConfig(**MODERN)),
    "distilbert-words": lambda: tf.DistilBertForTokenClassification(tf.DistilBertConfig(**DISTIL)),
}
ALL = [*DECODERS, *ENCODERS]
SHARES = (1.0, 0.7, 0.35)
LENGTHS = [19, 7, 12, 1]
CONFIGS = {
    "attention": HiddenPruningConfig(keep=SHARES, last=4),
    "attention, all asked": HiddenPruningConfig(keep=SHARES, last=0),
    "norm": HiddenPruningConfig(keep=SHARES, score="norm"),
    "random": HiddenPruningConfig(keep=SHARES, score="random"),
    "threshold": HiddenPruningConfig(threshold=(0.0, 0.055, 0.07), last=4, protect_first=2),
    "late": HiddenPruningConfig(keep=(1.0, 1.0, 0.5), last=4, protect_last=3),
}


def model_of(family: str) -> tf.PreTrainedModel:
    """An untrained model in eval mode and float64, with uneven attention."""
    if family in FAMILIES:
        return small_model(family).double()
    torch.manual_seed(0)
    model = (DECODERS | ENCODERS)[family]().eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def pruned(family: str, name: str = "attention") -> tf.PreTrainedModel:
    return prune_hidden(model_of(family), CONFIGS[name])


def batch_of(lengths: list[int], left: bool) -> dict[str, torch.Tensor]:
    """Rows of several lengths, padded on one side, with the positions that each token has in its own row."""
    n = max(lengths)
    column, length = torch.arange(n), torch.tensor(lengths)[:, None]
    mask = (column >= n - length) if left else (column < length)
    ids = torch.ones(len(lengths), n, dtype=torch.long)
    for row, size in enumerate(lengths):
        ids[row, mask[row]] = tokens(1, size, seed=row)[0].clamp(min=2)
    return {"input_ids": ids, "attention_mask": mask.long()}


def inputs(family: str, lengths: list[int], left: bool | None = None) -> dict[str, torch.Tensor]:
    """As the model wants them: padding on the left for decoders, on the right for encoders, unless told."""
    batch = batch_of(lengths, family in DECODERS if left is None else left)
    if family in DECODERS:
        batch |= {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    return batch


def said(model, family: str, batch: dict[str, torch.Tensor], grad: bool = False) -> torch.Tensor:
    """Logits of the tokens that are none of padding, (tokens, vocabulary) or, of whole texts, (batch, labels)."""
    extra = {"use_cache": False} if family in DECODERS else {}
    with torch.set_grad_enabled(grad):
        logits = model(**batch, **extra).logits
    return logits if logits.ndim == 2 else logits[batch["attention_mask"].bool()]


class Masked(nn.Module):
    """A layer over all columns; kept (batch, n): those that are in the stream."""

    def __init__(self, inner: nn.Module, kept: torch.Tensor, causal: bool):
        super().__init__()
        self.inner, self.kept, self.causal = inner, kept, causal
        self.attention_type = getattr(inner, "attention_type", None)

    def forward(self, *args, **kwargs):
        named = dict(inspect.signature(self.inner.forward).bind(*args, **kwargs).arguments)
        named |= named.pop("kwargs", {})
        hidden, n = named.pop("hidden_states"), self.kept.shape[1]
        square = torch.ones(1, 1, n, n, dtype=torch.bool)
        mask = named.get("attention_mask")
        mask = (square.tril() if self.causal else square) if mask is None else mask
        named["attention_mask"] = mask & self.kept[:, None, None, :]
        return torch.where(self.kept[:, :, None], self.inner(hidden, **named), hidden)


def masked(family: str, kept: torch.Tensor) -> tf.PreTrainedModel:
    """The reference, under decisions (layers, batch, n) that were taken elsewhere."""
    model = model_of(family)
    layers, causal = hidden_pruning._layers(model)
    for index, inner in enumerate(layers):
        layers[index] = Masked(inner, kept[index], causal)
    return model
