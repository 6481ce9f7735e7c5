"""Which operations make pruned attention?

`impl` never changes the meaning, only the speed: "reference" is the float64 truth, "torch" runs everywhere, "triton" on
GPUs, "native" decodes on CPUs; "auto" takes Triton on a GPU and native on a CPU where they have agreed with the
reference (kernels.agreement), else torch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune.kernels import checks
from ctxprune.kernels.decode.pages import NEVER, Pages
from ctxprune.kernels.hard_attention.patterns import Pattern
from ctxprune.kernels.implementations import IMPLEMENTATIONS, Impl, as_written, decodes_by_triton, describe, run
from ctxprune.kernels.soft_attention import torch_gates

__all__ = [
    "IMPLEMENTATIONS",
    "Pages",
    "Pattern",
    "alpha_sigmoid",
    "decode_attention",
    "decodes_by_triton",
    "describe",
    "drop_time_attention",
    "drop_times",
    "extend_attention",
    "log_survival",
    "pruned_attention",
]


def alpha_sigmoid(x: Float[Tensor, ...], alpha: float, *, impl: Impl = "auto") -> Float[Tensor, ...]:
    """Keep probability of gate logits x: exact binary alpha-entmax (arXiv 2305.15805, section 3).

    Exactly 0 for x <= -1/(alpha-1), exactly 1 for x >= 1/(alpha-1), logistic at alpha = 1. Same shape as x.
    Raises ValueError if alpha is outside [1, 16].
    """
    checks.alpha(alpha)
    checks.dtypes(checks.FLOATS, x=x)
    return run("alpha_sigmoid", impl, x, alpha)


def pruned_attention(
    query: Float[Tensor, "batch heads n width"],
    key: Float[Tensor, "batch kv_heads n width"],
    value: Float[Tensor, "batch kv_heads n width"],
    interaction_query: Float[Tensor, "batch n rank"],
    interaction_key: Float[Tensor, "batch n rank"],
    beta: Float[Tensor, ""],
    alpha: float,
    *,
    guard: Int[Tensor, "batch n"] | None = None,
    end: Int[Tensor, "batch n"] | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> tuple[Float[Tensor, "batch heads n width"], Float[Tensor, " batch"]]:
    """Soft (trainable) attention softmax(Q K^T scale + log I) V, causal (arXiv 2305.15805, eq. 5 and 6).

    I[k, j] is the product over queries j < m <= k of sigma_alpha(interaction_query[m] . interaction_key[j] / sqrt(rank)
    + beta). guard[b, j] is the first query whose gate may drop key j (default and least j + 1; later protects recent
    tokens, n protects for ever); end[b, j] the first query that cannot see key j whatever the gates say (default n, at
    least j + 1; the end of its document when several are packed in a row).

    Returns the output and, per row of the batch, the sum of I over the visible pairs j < k < end[j], for the sparsity
    regulariser. Differentiable in the first six arguments. Raises ValueError on shapes that do not fit.
    """
    checks.alpha(alpha)
    checks.attention(query, key, value)
    checks.interaction(interaction_query, interaction_key, beta, query.shape[0], query.shape[2])
    checks.devices(query=query, interaction_query=interaction_query)
    guard, end = _defaults(guard, end, interaction_query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return run(
        "pruned_attention", impl, query, key, value, interaction_query, interaction_key, beta, alpha, guard, end, scale
    )


def log_survival(
    interaction_query: Float[Tensor, "batch n rank"],
    interaction_key: Float[Tensor, "batch n rank"],
    beta: Float[Tensor, ""],
    alpha: float,
    *,
    guard: Int[Tensor, "batch n"] | None = None,
    end: Int[Tensor, "batch n"] | None = None,
) -> Float[Tensor, "batch n n"]:
    """log I[k, j] itself, differentiable: n x n numbers, for drops that accumulate over depth. Entries with j > k
    are 0."""
    checks.alpha(alpha)
    batch, n = interaction_query.shape[:2]
    checks.interaction(interaction_query, interaction_key, beta, batch, n)
    guard, end = _defaults(guard, end, interaction_query)
    return as_written(torch_gates.log_survival)(interaction_query, interaction_key, beta, alpha, guard, end)


def drop_times(
    interaction_query: Float[Tensor, "batch n rank"],
    interaction_key: Float[Tensor, "batch n rank"],
    beta: Float[Tensor, ""],
    *,
    guard: Int[Tensor, "batch n"] | None = None,
    end: Int[Tensor, "batch n"] | None = None,
    impl: Impl = "auto",
) -> Int[Tensor, "batch n"]:
    """First query that no longer sees each key under the step function: min{k >= guard[j] : x[k, j] <= 0}, at most
    end[j].

    Key j is visible to query k iff j <= k < drop_times[j]; never dropped reads as end[j] (n by default).
    """
    batch, n = interaction_query.shape[:2]
    checks.interaction(interaction_query, interaction_key, beta, batch, n)
    guard, end = _defaults(guard, end, interaction_query)
    return run("drop_times", impl, interaction_query, interaction_key, beta, guard, end)


def drop_time_attention(
    query: Float[Tensor, "batch heads n width"],
    key: Float[Tensor, "batch kv_heads n width"],
    value: Float[Tensor, "batch kv_heads n width"],
    drop_time: Int[Tensor, "batch *kv_heads n"],
    *,
    pattern: Pattern | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "batch heads n width"]:
    """Causal attention in which query k sees key j iff j <= k < drop_time[j]; one drop time per key or per KV head.

    pattern: keys that blocks of queries may see at all (kernels.hard_attention.patterns), for rules that come back to
    a key. Differentiable in query, key and value. Raises ValueError on shapes that do not fit.
    """
    checks.attention(query, key, value)
    checks.drop_time(drop_time, query, key)
    checks.pattern(pattern, query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return run("drop_time_attention", impl, query, key, value, drop_time, scale, pattern)


def decode_attention(
    query: Float[Tensor, "rows heads width"],
    key: Float[Tensor, "rows kv_heads width"],
    value: Float[Tensor, "rows kv_heads width"],
    interaction_query: Float[Tensor, "rows rank"] | None,
    interaction_key: Float[Tensor, "rows rank"] | None,
    beta: Float[Tensor, ""] | None,
    step: Int[Tensor, " rows"],
    pages: Pages,
    *,
    guard: Int[Tensor, " rows"] | None = None,
    drop_time: Int[Tensor, " rows"] | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
    check: bool = True,
) -> Float[Tensor, "rows heads width"]:
    """One more token per row: store it, drop what its gates drop, attend to what is left. Changes `pages` in place.

    step: position of each row's token, negative for an idle row (its output is 0). guard and drop_time: those of the
    new token (by default, and at least, step + 1; by default never). A gate x <= 0 at a step from a key's guard on
    drops the key for that step and all later ones, as drop_times says of whole rows; without interaction_query only
    drop times drop. A token takes a slot that is free, else the next one; if its row has no page left it is not
    stored, its output is NaN and pages.refused counts it. Values in slots that nobody uses must be finite. check=False:
    the arguments are known to fit, guard and drop_time to be given, in 32 bits, and to spare their own token.
    """
    if check:
        times = {name: tensor for name, tensor in (("guard", guard), ("drop_time", drop_time)) if tensor is not None}
        checks.decode(query, key, value, interaction_query, interaction_key, beta, step, pages, **times)
        step, guard, drop_time = _from_the_next(step, guard, drop_time)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    gates = (interaction_query, interaction_key, beta)
    return run("decode_attention", impl, query, key, value, *gates, step, guard, drop_time, pages, scale)


def extend_attention(
    query: Float[Tensor, "rows heads n width"],
    key: Float[Tensor, "rows kv_heads n width"],
    value: Float[Tensor, "rows kv_heads n width"],
    interaction_query: Float[Tensor, "rows n rank"] | None,
    interaction_key: Float[Tensor, "rows n rank"] | None,
    beta: Float[Tensor, ""] | None,
    step: Int[Tensor, "rows n"],
    pages: Pages,
    *,
    guard: Int[Tensor, "rows n"] | None = None,
    drop_time: Int[Tensor, "rows n"] | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Float[Tensor, "rows heads n width"]:
    """Several more tokens per row, as that many calls of decode_attention, which says what the arguments are.

    step: positions, rising within a row; negative for padding (its output is 0). Tokens take the next slots of their
    rows, never free ones, and are stored even if a later one of the same call drops them. Raises ValueError where a row
    has too few pages.
    """
    times = {name: tensor for name, tensor in (("guard", guard), ("drop_time", drop_time)) if tensor is not None}
    checks.extend(query, key, value, interaction_query, interaction_key, beta, step, pages, **times)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    gates = (interaction_query, interaction_key, beta)
    return run(
        "extend_attention", impl, query, key, value, *gates, *_from_the_next(step, guard, drop_time), pages, scale
    )


def _from_the_next(step: Tensor, guard: Tensor | None, drop_time: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """In 32 bits: step; guard and drop time, at least the step after a token's own, since it always sees itself."""
    step = step.to(torch.int32)
    never = torch.full_like(step, NEVER)

    def later(times: Tensor) -> Tensor:
        return torch.maximum(times.clamp(max=NEVER).to(torch.int32), step + 1)

    return step, step + 1 if guard is None else later(guard), never if drop_time is None else later(drop_time)


def _defaults(guard: Tensor | None, end: Tensor | None, gates: Tensor) -> tuple[Tensor, Tensor]:
    batch, n, _ = gates.shape
    if guard is None:
        guard = torch.zeros(batch, n, dtype=torch.long, device=gates.device)
    if end is None:
        end = torch.full((batch, n), n, device=gates.device)
    checks.times(batch, n, gates, guard=guard, end=end)
    # No gate acts on its own token, and no document ends before the token that it begins with.
    first = torch.arange(1, n + 1, device=gates.device)
    return torch.maximum(guard, first), torch.maximum(end, first)
