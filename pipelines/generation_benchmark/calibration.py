"""How do random gates come to drop what is asked? Each layer's offset is settled on what that layer reads."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune.gate import InteractionGate
from ctxprune.retrofitting import mode, wrappers

STD = 1.36
"""Standard deviation of the gates' weights times the root of the width: logits of a spread near 2 then, at any rank."""
TOKENS = 131072
"""Tokens of the prompts on which offsets are settled at most, for their memory: all that is measured where it can be,
since rows of random text differ by points."""
HIGHEST = 32.0
"""Half a distance to the lowest logit at which nothing is dropped; logits have a spread near 2."""
GAP = 1e-4
"""Rounding of a logit, with room: tokens that are alike have logits that are alike."""
BLOCK = 256
"""Queries at a time."""


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
    """A key is gone at the end where its lowest logit, plus beta, is not above 0: beta is minus a number that the share
    `drop` of all lowest logits lies below, in the nearest gap where rounding cannot reach one."""
    query, key, _ = gate(hidden)
    lowest = lowest_logits(query, key).flatten()
    rising = lowest[lowest.isfinite()].sort().values  # no later query asks a row's last key
    edges = torch.cat([rising[:1] - 2 * HIGHEST, rising, rising[-1:] + 1.0])
    gaps = (edges.diff() > GAP).nonzero().squeeze(1)
    gone = gaps[(gaps - drop * lowest.numel()).abs().argmin()]
    gate.beta.fill_(-0.5 * (edges[gone] + edges[gone + 1]))


def lowest_logits(query: Float[Tensor, "batch n rank"], key: Float[Tensor, "batch n rank"]) -> Float[Tensor, "batch n"]:
    """min over later queries k of query[k] . key[j] / sqrt(rank); infinite where there is none."""
    n = key.shape[1]
    lowest = torch.full(key.shape[:2], torch.inf, dtype=key.dtype, device=key.device)
    column = torch.arange(n, device=key.device)
    for start in range(1, n, BLOCK):
        end = min(n, start + BLOCK)
        logits = query[:, start:end] @ key[:, :end].transpose(1, 2) * key.shape[2] ** -0.5
        early = column[:end] >= column[start:end, None]
        lowest[:, :end] = torch.minimum(lowest[:, :end], logits.masked_fill_(early, torch.inf).amin(1))
    return lowest
