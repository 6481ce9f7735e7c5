"""What attention will a key get? The mass that what follows the context, or a part of it, puts on each of its keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxprune.policies.scorer import attention
from ctxprune.replay import Context, Resuming, resume


@dataclass
class _Watched(Resuming):
    """Attends as usual, and writes down what the context's keys got."""

    got: list[Tensor]
    asked: Tensor | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        shares = attention(query, torch.cat([self.keys, key], 2), self.seen(query)[None, None], scale)
        mass = shares[..., : self.keys.shape[2]].mean(1)
        self.got.append((mass if self.asked is None else mass * self.asked[..., None]).sum(1))
        return super().attend(query, key, value, scale)


@torch.no_grad()
def future_attention(
    model, context: Context, follows: Int[Tensor, "batch n"], asked: Bool[Tensor, "batch n"] | None = None
) -> Float[Tensor, "layers batch context"]:
    """Attention of the tokens that follow, summed over them, mean over heads. asked: which of them count; None: all."""
    got: list[Tensor] = []

    def call(keys: Tensor, values: Tensor, bias: Tensor | None) -> Resuming:
        return _Watched(keys, values, bias, got, asked)

    resume(model, context, follows, [None] * context.layers, calls=call)
    return torch.stack(got)
