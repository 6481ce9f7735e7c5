"""What would the answer lose without a key? The gradient of what the model says, taken to every edge of its attention.

For the last queries of a text the logit of the token that the model predicts is summed and differentiated with respect
to what each head puts out: G. Without key j a head that gives it the share a_j puts out (o - a_j v_j) / (1 - a_j), so
that it loses a_j / (1 - a_j) (v_j - o) . G to first order in the output; for the one key that may have nearly all of a
query's attention the output without it is computed outright. (A gradient with respect to the attention logits vanishes
there: it saturates where the key matters most.) Beside reading the text that costs one forward and backward pass of the
last queries alone. Not of the loss, which is flat where the model is sure.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ctxprune.policies.scorer import attention
from ctxprune.replay import Context, Resuming, resume


@dataclass
class _Edges:
    """One layer's attention of what follows: shares (batch, heads, n, keys) over all keys, values of each head, output
    and output without each query's first key (batch, heads, n, width); leaf: zeros added to the output."""

    shares: Tensor
    values: Tensor
    output: Tensor
    without_first: Tensor
    leaf: Tensor

    def losses(self, gradient: Tensor) -> Tensor:
        """(batch, heads, n, keys): what the sum of the predictions loses with each edge."""
        shares, first, gradient = self.shares, self.shares.argmax(-1, keepdim=True), gradient.to(self.shares.dtype)
        along = (gradient * self.output).sum(-1, keepdim=True)
        # The first key's own share may be all there is: its loss is set below.
        odds = shares / (1.0 - shares.scatter(-1, first, 0.0))
        loss = odds * (gradient @ self.values.transpose(-1, -2) - along)
        return loss.scatter(-1, first, along - (gradient * self.without_first).sum(-1, keepdim=True))


@dataclass
class _Watched(Resuming):
    """Attends as usual, and writes down what its edges carry."""

    edges: list[_Edges]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        output = super().attend(query, key, value, scale)
        seen = self.seen(query)[None, None]
        with torch.no_grad():
            keys, each = torch.cat([self.keys, key], 2), query.shape[1] // key.shape[1]
            values = torch.cat([self.values, value], 2).repeat_interleave(each, 1)
            shares = attention(query, keys, seen, scale)
            values = values.to(shares.dtype)
            others = seen.expand(shares.shape).scatter(-1, shares.argmax(-1, keepdim=True), False)
            # A query that sees one key only has nothing without it.
            without = attention(query, keys, others, scale) @ values
        leaf = torch.zeros_like(output, requires_grad=True)
        self.edges.append(_Edges(shares, values, output.detach(), without, leaf))
        return output + leaf


def edge_gradients(
    model,
    context: Context,
    follows: Int[Tensor, "batch n"],
    asked: Bool[Tensor, "batch n"] | None = None,
    *,
    signed: bool = False,
) -> Float[Tensor, "layers batch context"]:
    """Worth of each key of the context to what is predicted at the tokens that follow: per layer the positive losses of
    its edges, summed over heads and queries.

    asked: which predictions count; None: all. signed: the losses themselves, which estimate leaving single keys out; to
    rank keys that go together the positive part does better, for what one query gains another must not lose.
    """
    edges: list[_Edges] = []

    def call(keys: Tensor, values: Tensor, bias: Tensor | None) -> Resuming:
        return _Watched(keys, values, bias, edges)

    with torch.enable_grad():
        said = resume(model, context, follows, [None] * context.layers, calls=call)
        # The model's own prediction is a constant here: which token it is does not move.
        best = said.gather(-1, said.argmax(-1, keepdim=True)).squeeze(-1)
        total = (best if asked is None else best * asked).sum()
        gradients = torch.autograd.grad(total, [edge.leaf for edge in edges])
    length = context.ids.shape[1]
    losses = [edge.losses(gradient)[..., :length] for edge, gradient in zip(edges, gradients, strict=True)]
    return torch.stack([(loss if signed else loss.relu()).sum((1, 2)) for loss in losses])


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
