"""What would a model have said with other keys? Its context is read once; what follows is run again, as often as one
likes, with any bias on the context's keys.

Everything that learns from consequences uses it: gradients with respect to single keys, leaving keys out, rollouts of
an agent, soft masks. A bias of -inf hides a key; 0 leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ctxprune.errors import UserError
from ctxprune.retrofitting import state_of, wrappers


@dataclass
class Context:
    """What each layer made of a batch of contexts, everything visible. Of each layer: hidden (batch, n, hidden) inputs,
    queries (batch, heads, n, width), keys and values (batch, kv_heads, n, width), and the scale of its attention."""

    ids: Int[Tensor, "batch n"]
    hidden: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)

    @property
    def layers(self) -> int:
        return len(self.keys)


@dataclass
class Reading:
    """One layer's call while a context is read: what it sees is written down."""

    context: Context

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query, key, value (batch, heads, n, width) -> (batch, heads, n, width)."""
        for kept, new in zip(
            (self.context.queries, self.context.keys, self.context.values), (query, key, value), strict=True
        ):
            kept.append(new)
        self.context.scales.append(scale)
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


@dataclass
class Resuming:
    """One layer's call while what follows is run: context's keys first, under the bias, then its own."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query (rows, heads, n, width), key and value (rows, kv_heads, n, width) -> (rows, heads, n, width)."""
        rows, _, n, _ = query.shape
        length = self.keys.shape[2]
        own = query.new_zeros(n, n).masked_fill_(~self.seen(query)[:, length:], -torch.inf)
        bias = query.new_zeros(1, 1, 1, length) if self.bias is None else self.bias.to(query.dtype)
        heads = bias.shape[1]
        mask = torch.cat([bias.expand(rows, heads, n, length), own.expand(rows, heads, n, n)], -1)
        keys, values = torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)

    def seen(self, query: Tensor) -> Bool[Tensor, "n keys"]:
        """Which keys, the context's first, each query may see, bias or not."""
        n, length = query.shape[2], self.keys.shape[2]
        place = torch.arange(length + n, device=query.device)
        return place <= place[length:, None]


@torch.no_grad()
def read(model, ids: Int[Tensor, "batch n"]) -> Context:
    """Read contexts of a retrofitted model, dropping nothing whatever its policy.

    Raises UserError where a layer's own sliding window is shorter than the contexts.
    """
    _refuse_windows(model, ids.shape[1])
    state, context = state_of(model), Context(ids)

    def call(layer: int, hidden: Tensor) -> Reading:
        context.hidden.append(hidden)
        return Reading(context)

    state.replay = call
    try:
        model(ids, use_cache=False, logits_to_keep=1)
    finally:
        state.replay = None
    return context


def resume(
    model,
    context: Context,
    ids: Int[Tensor, "rows n"],
    bias: Sequence[Float[Tensor, "some_rows some_heads some_queries context"] | None],
    row: Int[Tensor, " rows"] | None = None,
    calls: Callable[[Tensor, Tensor, Tensor | None], Resuming] = Resuming,
) -> Float[Tensor, "rows n vocab"]:
    """Logits of what follows contexts, under one bias per layer on the logits of the context's keys.

    ids: the tokens that follow; row: which context each of these rows follows (by default its own); axes of a bias may
    be 1; calls: how a layer attends, a Resuming. Differentiable in the biases and the model. Raises UserError where a
    layer's own sliding window is shorter than both together.
    """
    _refuse_windows(model, context.ids.shape[1] + ids.shape[1])
    state, length = state_of(model), context.ids.shape[1]

    def call(layer: int, hidden: Tensor) -> Resuming:
        keys, values = context.keys[layer], context.values[layer]
        if row is not None:
            keys, values = keys[row], values[row]
        return calls(keys, values, bias[layer])

    state.replay = call
    try:
        position = torch.arange(length, length + ids.shape[1], device=ids.device).expand_as(ids)
        return model(ids, position_ids=position, use_cache=False).logits
    finally:
        state.replay = None


def _refuse_windows(model, tokens: int) -> None:
    """UserError where a layer's own sliding window does not see so many tokens."""
    windows = [wrapper.window for wrapper in wrappers(model) if wrapper.window is not None]
    if windows and min(windows) < tokens:
        raise UserError(
            f"a layer of this model sees {min(windows)} tokens, and there are {tokens} with what follows them: what is "
            "taught would be of another model; give contexts that end within its window"
        )
