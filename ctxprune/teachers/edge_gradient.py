"""What would the answer lose without a key? Gradients of what the model says with respect to single attention logits.

For the last queries of a text a leaf of zeros is added to their attention logits, the logit of the token that the model
predicts is summed and differentiated: positive gradients are summed over queries. Not the loss, which is flat where the
model is sure. Beside reading the text that costs one forward and backward pass of these queries alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxprune.replay import Context, resume


def edge_gradients(
    model,
    context: Context,
    follows: Int[Tensor, "batch n"],
    asked: Bool[Tensor, "batch n"] | None = None,
    *,
    signed: bool = False,
) -> Float[Tensor, "layers batch context"]:
    """Worth of each key of the context to what is predicted at the tokens that follow.

    asked: which of these predictions count; None: all. Per layer the sum over heads and queries of relu(d logit of the
    predicted token / d attention logit). signed: without the relu, the first order of leaving one key out; to rank what
    goes together with others the positive part does better, for what one query gains another must not lose.
    """
    batch, n, length = len(follows), follows.shape[1], context.ids.shape[1]
    heads = context.queries[0].shape[1]
    with torch.enable_grad():
        leaves = [context.keys[0].new_zeros(batch, heads, n, length, requires_grad=True) for _ in range(context.layers)]
        said = resume(model, context, follows, leaves)
        # The model's own prediction is a constant here: which token it is does not move with the leaves.
        best = said.gather(-1, said.argmax(-1, keepdim=True)).squeeze(-1)
        total = (best if asked is None else best * asked).sum()
        gradients = torch.autograd.grad(total, leaves)
    return torch.stack([(gradient if signed else gradient.relu()).sum((1, 2)) for gradient in gradients])


@torch.no_grad()
def left_out(
    model,
    context: Context,
    follows: Int[Tensor, "batch n"],
    layer: int,
    keys: Int[Tensor, " some"],
    asked: Bool[Tensor, "batch n"] | None = None,
) -> Float[Tensor, "batch some"]:
    """The truth that gradients stand for: how much the sum of the predicted tokens' logits falls when one layer loses
    one key. asked: which predictions count; None: all."""
    length = context.ids.shape[1]
    nothing: list[Tensor | None] = [None] * context.layers
    said = resume(model, context, follows, nothing)
    best = said.argmax(-1, keepdim=True)
    counts = torch.ones_like(follows, dtype=said.dtype) if asked is None else asked.to(said.dtype)
    whole, losses = (said.gather(-1, best).squeeze(-1) * counts).sum(1), []
    for key in keys.tolist():
        hidden = torch.zeros(1, 1, 1, length, device=follows.device)
        hidden[..., key] = -torch.inf
        bias = [*nothing[:layer], hidden, *nothing[layer + 1 :]]
        left = resume(model, context, follows, bias).gather(-1, best).squeeze(-1)
        losses.append(whole - (left * counts).sum(1))
    return torch.stack(losses, 1)
