"""How does a pretrained model learn to forget? Each layer's attention is wrapped; nothing else of the model changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

from torch import nn
from transformers import PreTrainedModel

from ctxprune import attention
from ctxprune.attention import PrunedAttention
from ctxprune.calls import Mode, PruningState
from ctxprune.errors import UserError
from ctxprune.generation.model_generate import forgets
from ctxprune.policies import PolicyConfig

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
"""What decoder layers of transformers call their attention."""
FULL, SLIDING = "full_attention", "sliding_attention"
"""What `layer_types` of a config may say of a layer."""
TWICE = ("diffllama",)
"""Families that call their attention twice per layer, which a cache would take for two tokens."""
NOT_SEPARABLE = ("attn_logit_softcapping", "attn_logit_softcap")
"""Config fields of attention variants whose logits are not a plain softmax."""


def retrofit(model: PreTrainedModel, config: PolicyConfig) -> PreTrainedModel:
    """Wrap every attention layer of a causal language model of transformers, in place, and return the model.

    config: GateConfig (learned gates, new trainable parameters) or any other of ctxprune.policies. The model's own
    weights are untouched: while nothing is dropped its logits are bit-identical to before. Works for the families that
    follow transformers' attention convention (GPT-2, Llama, Qwen3, Mistral, GPT-NeoX, ...); raises UserError for the
    rest, and if the model is retrofitted already.
    """
    if state_of(model, default=None) is not None:
        raise UserError("this model is already retrofitted: load the original again to change its pruning")
    places = list(_attention_layers(model))
    _refuse_unsupported(model, places)
    # All rules first: a policy that does not fit must leave the model as it was.
    kv_heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    rules = config.rules(len(places), model.config.hidden_size, kv_heads)
    windows = [_sliding_window(model, getattr(layer, name), i) for i, (layer, name) in enumerate(places)]
    if getattr(config, "propagate_in_depth", False) and len(set(windows)) > 1:
        # A key that leaves one layer's window has not been dropped, and the layer below may still see it.
        raise UserError(
            "propagate_in_depth goes with layers of one sliding window, this model has several: leave it out"
        )
    attention.register()
    model.set_attn_implementation(attention.NAME)
    state = PruningState(config, len(places))
    for index, (layer, name) in enumerate(places):
        inner = getattr(layer, name)
        wrapper = PrunedAttention(inner, rules[index], index, state)
        wrapper.window = windows[index]
        weight = next(inner.parameters())
        wrapper.rule.to(dtype=weight.dtype, device=weight.device)
        wrapper.train(inner.training)
        setattr(layer, name, wrapper)
    forgets(model, state)
    return model


def wrappers(model: nn.Module) -> list[PrunedAttention]:
    """The wrapped attention layers, first layer first; empty if the model is not retrofitted."""
    return [module for module in model.modules() if isinstance(module, PrunedAttention)]


def state_of(model: nn.Module, **default) -> PruningState:
    """What the wrapped layers share; UserError if the model is not retrofitted and no `default` is given."""
    found = wrappers(model)
    if found:
        return found[0].state
    if "default" in default:
        return default["default"]
    raise UserError("this model is not retrofitted: call ctxprune.retrofit(model, ctxprune.GateConfig()) first")


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the retrofit added, layer by layer."""
    return [p for wrapper in wrappers(model) for p in wrapper.rule.parameters()]


@contextmanager
def mode(model: nn.Module, value: Mode) -> Iterator[None]:
    """Within the block: `soft` gates, the `hard` step function, or `dense` (gates bypassed), whatever model.training
    says; `auto` follows it. UserError for another word."""
    if value not in get_args(Mode):
        raise UserError(f"mode {value!r}: choose one of {', '.join(get_args(Mode))}")
    state = state_of(model)
    before, state.mode = state.mode, value
    try:
        yield
    finally:
        state.mode = before


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode, its dropout off; behind it every module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _attention_layers(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
    """(decoder layer, name of its attention child), in order of layer_idx."""
    found: list[tuple[int, nn.Module, str]] = []
    for layer in model.modules():
        for name in ATTENTION_NAMES:
            child = getattr(layer, name, None)
            index = getattr(child, "layer_idx", None)
            if isinstance(child, nn.Module) and isinstance(index, int):
                found.append((index, layer, name))
    for _, layer, name in sorted(found, key=lambda entry: entry[0]):
        yield layer, name


def _refuse_unsupported(model: PreTrainedModel, places: list) -> None:
    """UserError that names the family and what it lacks."""
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"a {type(model).__name__} is not a transformers model: pass e.g. AutoModelForCausalLM")
    config = model.config
    family, layers = config.model_type, getattr(config, "num_hidden_layers", None)
    indices = [getattr(layer, name).layer_idx for layer, name in places]
    if getattr(config, "is_encoder_decoder", False):
        reason = "it has an encoder; only decoder-only models can drop context"
    elif not places or not type(model)._can_set_attn_implementation():
        reason = "its attention does not go through transformers' attention interface"
    elif indices != list(range(layers or len(places))):
        reason = f"{len(places)} of its {layers} layers hold an attention that can be wrapped; all of them must"
    elif any(getattr(config, name, None) for name in NOT_SEPARABLE):
        reason = "it caps its attention logits"
    elif others := sorted(set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}):
        reason = f"it has layers of {', '.join(others)}"
    elif any(getattr(getattr(layer, name), "is_kv_shared_layer", False) for layer, name in places):
        reason = "some of its layers use the keys of others"
    elif family in TWICE:
        reason = "it calls its attention twice per layer"
    elif any(getattr(getattr(layer, name), "sinks", None) is not None for layer, name in places):
        reason = "its attention has learned sink logits"
    elif any(not weight.is_floating_point() or weight.element_size() < 2 for weight in model.parameters()):
        reason = "its weights are quantised; load them in 16 bits or more"
    elif len(devices := sorted({str(weight.device) for weight in model.parameters()})) > 1:
        reason = f"its weights are on {', '.join(devices)}; load it on one device"
    elif getattr(config, "reorder_and_upcast_attn", False):
        reason = "reorder_and_upcast_attn bypasses the attention interface; load it with that set to False"
    else:
        return
    raise UserError(f"models of the family {family!r} cannot be retrofitted: {reason}")


def _sliding_window(model: PreTrainedModel, inner: nn.Module, index: int) -> int | None:
    """The model's own window in a layer: where the config lists what layers are, in sliding ones alone (EXAONE 4 writes
    it on every attention); else the attention's own, or the config's, which holds for all (Mistral)."""
    config, own = model.config, getattr(inner, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return own or getattr(config, "sliding_window", None) if kinds[index] == SLIDING else None
    if own or getattr(config, "use_sliding_window", True) is False:
        return own
    return getattr(config, "sliding_window", None)


def set_alpha(model: nn.Module, alpha: float) -> None:
    """Sharpness of the soft gates, 1 (logistic) to 16; the step function does not depend on it."""
    if not 1.0 <= alpha <= 16.0:
        raise UserError(f"alpha is {alpha}: give a value from 1 to 16")
    state_of(model).alpha = float(alpha)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameters of the backbone and of the gates."""
    gates = sum(p.numel() for p in gate_parameters(model))
    return {"backbone": sum(p.numel() for p in model.parameters()) - gates, "gates": gates}


def freeze_backbone(model: nn.Module) -> None:
    """Only the gates stay trainable."""
    gates = {id(p) for p in gate_parameters(model)}
    if not gates:
        raise UserError("freezing the backbone leaves nothing to train: only pruning=learned has gates")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in gates)
