"""Which operations make pruned attention, and which implementation runs?

`impl` never changes the meaning, only the speed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels import checks
from kernels.decode import reference as _decode_reference
from kernels.decode import torch_path as _decode_torch
from kernels.decode.pages import NEVER, Pages
from kernels.hard_attention import reference as _hard_reference
from kernels.hard_attention import torch_path as _hard_torch
from kernels.hard_attention.patterns import Pattern
from kernels.liveness import reference as _times_reference
from kernels.liveness import torch_path as _times_torch
from kernels.sigmoid import reference as _alpha_reference
from kernels.sigmoid import torch_path as _alpha_torch
from kernels.soft_attention import reference as _soft_reference
from kernels.soft_attention import torch_gates as _soft_gates
from kernels.soft_attention import torch_path as _soft_torch


def _triton(folder: str, operation: str):
    """The operation in kernels/<folder>/triton_path.py, imported when it is first called: Triton may be missing."""

    def run(*arguments):
        if importlib.util.find_spec("triton") is None:
            raise ValueError("impl='triton': the package triton is not installed; take impl='torch'")
        return getattr(importlib.import_module(f"kernels.{folder}.triton_path"), operation)(*arguments)

    return run


Impl = Literal["auto", "reference", "torch", "triton"]
IMPLEMENTATIONS: dict[str, dict[str, object]] = {
    "alpha_sigmoid": {
        "reference": _alpha_reference.alpha_sigmoid,
        "torch": _alpha_torch.alpha_sigmoid,
        "triton": _triton("sigmoid", "alpha_sigmoid"),
    },
    "pruned_attention": {
        "reference": _soft_reference.pruned_attention,
        "torch": _soft_torch.pruned_attention,
        "triton": _triton("soft_attention", "pruned_attention"),
    },
    "drop_times": {
        "reference": _times_reference.drop_times,
        "torch": _times_torch.drop_times,
        "triton": _triton("liveness", "drop_times"),
    },
    "drop_time_attention": {
        "reference": _hard_reference.drop_time_attention,
        "torch": _hard_torch.drop_time_attention,
        "triton": _triton("hard_attention", "drop_time_attention"),
    },
    "decode_attention": {
        "reference": _decode_reference.decode_attention,
        "torch": _decode_torch.decode_attention,
        "triton": _triton("decode", "decode_attention"),
    },
}


def alpha_sigmoid(x: Float[Tensor, ...], alpha: float, *, impl: Impl = "auto") -> Float[Tensor, ...]:
    """Keep probability of gate logits x: exact binary alpha-entmax (arXiv 2305.15805, section 3).

    Exactly 0 for x <= -1/(alpha-1), exactly 1 for x >= 1/(alpha-1), logistic at alpha = 1. Same shape as x.
    Raises ValueError if alpha is outside [1, 16].
    """
    checks.alpha(alpha)
    checks.dtypes(checks.FLOATS, x=x)
    return _pick("alpha_sigmoid", impl)(x, alpha)


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
    return _pick("pruned_attention", impl)(
        query, key, value, interaction_query, interaction_key, beta, alpha, guard, end, scale
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
    return _as_written(_soft_gates.log_survival)(interaction_query, interaction_key, beta, alpha, guard, end)


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
    return _pick("drop_times", impl)(interaction_query, interaction_key, beta, guard, end)


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
    return _pick("drop_time_attention", impl)(query, key, value, drop_time, scale, pattern)


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
) -> Float[Tensor, "rows heads width"]:
    """One more token per row: store it, drop what its gates drop, attend to what is left. Changes `pages` in place.

    step: position of each row's token, negative for an idle row (its output is 0). guard and drop_time: those of the
    new token (by default, and at least, step + 1; by default never). A gate x <= 0 at a step from a key's guard on
    drops the key for that step and all later ones, as drop_times says of whole rows; without interaction_query only
    drop times drop. A token takes a slot that is free, else the next one; if its row has no page left it is not
    stored, its output is NaN and pages.refused counts it. Values in slots that nobody uses must be finite.
    """
    times = {name: tensor for name, tensor in (("guard", guard), ("drop_time", drop_time)) if tensor is not None}
    checks.decode(query, key, value, interaction_query, interaction_key, beta, step, pages, **times)
    step = step.to(torch.int32)
    # A token sees itself: nothing drops it at its own step.
    guard = step + 1 if guard is None else torch.maximum(guard.to(torch.int32), step + 1)
    drop_time = (
        torch.full_like(step, NEVER) if drop_time is None else torch.maximum(drop_time.to(torch.int32), step + 1)
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _pick("decode_attention", impl)(
        query, key, value, interaction_query, interaction_key, beta, step, guard, drop_time, pages, scale
    )


def describe() -> list[dict[str, object]]:
    """One record per operation and implementation: what runs here, and why not. `auto` takes torch everywhere: no
    Triton kernel has been seen to agree with the reference on a device yet."""
    cuda = torch.cuda.is_available()
    where = "CUDA and CPU" if cuda else "CPU (no CUDA device)"
    state = {
        "reference": (True, "float64, for tests"),
        "torch": (True, f"{where}, float64/float32/bfloat16/float16"),
        "triton": _triton_state(cuda),
    }
    return [
        {
            "operation": operation,
            "implementation": name,
            "available": state[name][0],
            "reason": state[name][1],
        }
        for operation, implementations in IMPLEMENTATIONS.items()
        for name in implementations
    ]


def _triton_state(cuda: bool) -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, "interpreted in Python (TRITON_INTERPRET=1), for tests"
    if not cuda:
        return False, "no CUDA device; TRITON_INTERPRET=1 interprets it, slowly"
    return True, "CUDA, float32/bfloat16/float16; on request only"


def _pick(operation: str, impl: str):
    available = IMPLEMENTATIONS[operation]
    name = "torch" if impl == "auto" else impl
    if name not in available:
        raise ValueError(f"impl={impl!r}: {operation} has {', '.join(['auto', *available])}")
    return available[name] if name == "triton" else _as_written(available[name])


def _as_written(function):
    """What torch.compile must leave alone: loops whose lengths depend on numbers, and gates that its CPU code gets
    wrong (expm1 as exp - 1, an exponent frozen at its first value). It compiles what lies before and behind."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


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
