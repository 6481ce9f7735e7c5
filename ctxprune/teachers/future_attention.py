"""What attention will a key get? The mass that what follows the context puts on each of its keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune.policies.scorer import attention
from ctxprune.replay import Context, Resuming, resume


@dataclass
class _Watched(Resuming):
    """Attends as usual, and writes down what the context's keys got."""

    got: list[Tensor]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        shares = attention(query, torch.cat([self.keys, key], 2), self.seen(query)[None, None], scale)
        self.got.append(shares[..., : self.keys.shape[2]].mean(1).sum(1))
        return super().attend(query, key, value, scale)


@torch.no_grad()
def future_attention(model, context: Context, follows: Int[Tensor, "batch n"]) -> Float[Tensor, "layers batch context"]:
    """Attention of the tokens that follow, summed over them, mean over heads."""
    got: list[Tensor] = []

    def call(keys: Tensor, values: Tensor, bias: Tensor | None) -> Resuming:
        return _Watched(keys, values, bias, got)

    resume(model, context, follows, [None] * context.layers, calls=call)
    return torch.stack(got)
