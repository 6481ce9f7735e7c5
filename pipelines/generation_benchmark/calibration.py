"""How do random gates come to drop what is asked? Each layer's offset is settled on what that layer reads."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

import kernels
from ctxprune.gate import InteractionGate
from ctxprune.retrofitting import mode, wrappers

STD = 1.36
"""Standard deviation of the gates' weights times the root of the width: logits of a spread near 2 then, at any rank."""
TOKENS = 16384
"""Tokens of the prompts on which offsets are settled; records say what all rows really keep."""
CLOSE = 0.002
"""Settling stops this close to the share asked for."""
HIGHEST = 32.0
"""No offset is beyond; logits have a spread near 2."""


@torch.no_grad()
def random_gates(model, seed: int) -> None:
    """Normal weights in every gate, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for wrapper in wrappers(model):
        gate = wrapper.rule.gate
        for linear in (gate.query, gate.key):
            normal = torch.randn(linear.weight.shape, generator=generator)
            linear.weight.copy_(normal * STD * linear.in_features**-0.5)


@torch.no_grad()
def calibrate(model, ids: Int[Tensor, "batch n"], drop: float) -> None:
    """Set every layer's beta so that the share `drop` of the keys of these prompts is gone at their end.

    One pass under the step function: a layer is settled when it is reached, so that deeper ones read what they will
    read later.
    """
    rows = ids[: max(1, TOKENS // ids.shape[1])]

    def settle(wrapper, arguments, keywords) -> None:
        _settle(wrapper.rule.gate, arguments[0] if arguments else keywords["hidden_states"], drop)

    hooks = [wrapper.register_forward_pre_hook(settle, with_kwargs=True) for wrapper in wrappers(model)]
    try:
        with mode(model, "hard"):
            model(rows, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()


def _settle(gate: InteractionGate, hidden: Float[Tensor, "batch n width"], drop: float) -> None:
    """Bisect beta: keys live longer as it rises."""
    query, key, _ = gate(hidden)
    low, high = -HIGHEST, HIGHEST
    for _ in range(24):
        middle = 0.5 * (low + high)
        gate.beta.fill_(middle)
        dropped = (kernels.drop_times(query, key, gate.beta.sum()) < hidden.shape[1]).double().mean().item()
        if abs(dropped - drop) <= CLOSE:
            return
        low, high = (middle, high) if dropped > drop else (low, middle)
