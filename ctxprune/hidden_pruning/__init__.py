"""How does a token leave the residual stream? Before some layers the least attended states are gathered out of it.

What is dropped is not computed by deeper layers, and its output is the state in which it left, so that heads see every
position. A cache filled by such a pass holds in each layer the keys that entered it, and can be decoded over. As PoWER-
BERT (arXiv 2001.08950), LTP (2107.00910), TR-BERT (2105.11618) and LazyLLM (2407.14057), whose dropped tokens may come
back: here they do not. Decisions look at later tokens: a loss at every position of a decoder would leak them, so train
one with its loss on what follows the prompt. One document per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ctxprune.errors import UserError
from ctxprune.hidden_pruning import stream as hidden_stream
from ctxprune.hidden_pruning.layer import HiddenPruning, PassStats, PrunedLayer
from ctxprune.hidden_pruning.schedule import HiddenPruningConfig
from ctxprune.retrofitting import NOT_SEPARABLE, wrappers

__all__ = ["HiddenPruning", "HiddenPruningConfig", "PassStats", "dense", "prune_hidden", "pruning_of", "release_hidden"]


def prune_hidden(model: PreTrainedModel, config: HiddenPruningConfig) -> PreTrainedModel:
    """Wrap every layer of a decoder or an encoder of transformers, in place, and return the model.

    While nothing is dropped its outputs are bit-identical to before. Works for families whose layers stand in one list
    and call transformers' attention interface (GPT-2, Llama, BERT and their like), loaded with
    attn_implementation="sdpa"; UserError for the rest, and for a config of another number of layers. Each pass over
    whole rows is pruned, in training too; decoding over its cache is not pruned further. `output_hidden_states` are
    the shorter ones.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"a {type(model).__name__} is not a transformers model: pass e.g. AutoModelForCausalLM")
    if _wrapped(model):
        raise UserError("this model's hidden states are pruned already: call release_hidden(model) first")
    layers, causal = _layers(model)
    if config.layers != len(layers):
        raise UserError(f"hidden pruning has {config.layers} entries, the model {len(layers)} layers: give one each")
    hidden_stream.register()
    model.set_attn_implementation(hidden_stream.NAME)
    state = HiddenPruning(config, causal)
    for index, inner in enumerate(layers):
        wrapper = PrunedLayer(inner, index, state, model.config)
        layers[index] = wrapper.train(inner.training)
    return model


def release_hidden(model: PreTrainedModel) -> PreTrainedModel:
    """Undo prune_hidden in place: the model's own layers, under the names of its checkpoint."""
    pruning_of(model)
    for stack in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for index, layer in enumerate(stack):
            if isinstance(layer, PrunedLayer):
                stack[index] = layer.inner
    model.set_attn_implementation("sdpa")
    return model


def pruning_of(model: nn.Module) -> HiddenPruning:
    """What the wrapped layers share: `config`, `on`, and `stats` of the last pass over whole rows."""
    found = _wrapped(model)
    if not found:
        raise UserError("this model's hidden states are not pruned: call prune_hidden(model, HiddenPruningConfig(...))")
    return found[0].state


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Within the block nothing is dropped."""
    state = pruning_of(model)
    before, state.on = state.on, False
    try:
        yield
    finally:
        state.on = before


def _wrapped(model: nn.Module) -> list[PrunedLayer]:
    return [module for module in model.modules() if isinstance(module, PrunedLayer)]


def _layers(model: PreTrainedModel) -> tuple[nn.ModuleList, bool]:
    """The model's layers and whether they are causal; UserError, naming the family, where it cannot be done."""
    config = model.config
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and module
        and all(isinstance(m, GradientCheckpointingLayer) for m in module)
    ]
    rules = [
        [bool(m.is_causal) for m in layer.modules() if hasattr(m, "is_causal")] for stack in stacks for layer in stack
    ]
    if wrappers(model):
        reason = "it is retrofitted; load the original"
    elif getattr(config, "is_encoder_decoder", False):
        reason = "it has an encoder and a decoder; one stack of layers can drop tokens"
    elif len(stacks) != 1 or not type(model)._can_set_attn_implementation():
        reason = "its layers do not stand in one list or do not go through transformers' attention interface"
    elif any(len(rule) != 1 for rule in rules) or len({rule[0] for rule in rules}) != 1:
        reason = "its layers do not hold one attention each, all causal or none"
    elif any(getattr(config, name, None) for name in NOT_SEPARABLE):
        reason = "it caps its attention logits"
    elif len({parameter.device for parameter in model.parameters()}) > 1:
        reason = "its weights are on several devices; load it on one"
    elif getattr(config, "layerdrop", 0.0):
        reason = "layerdrop skips layers in training; load it with layerdrop=0"
    elif config._attn_implementation != "sdpa":
        reason = f'its attention is {config._attn_implementation!r}; load it with attn_implementation="sdpa"'
    else:
        return stacks[0], rules[0][0]
    raise UserError(f"hidden states of the family {config.model_type!r} cannot be pruned: {reason}")
