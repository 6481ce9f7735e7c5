"""Do the arguments of an operation fit? If not, a ValueError that names the argument and what it may be.

Numbers inside tensors are looked at on the CPU only: on a GPU that would cost a synchronisation per call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctxprune.kernels.decode.pages import Pages
from ctxprune.kernels.hard_attention.patterns import Pattern

MAX_ALPHA = 16.0
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


class Refused(ValueError):
    """Arguments that a kernel does not take and the torch path does, or a kernel that cannot be built."""


def alpha(value: float) -> None:
    """Raises ValueError outside [1, 16], and for NaN."""
    if not 1.0 <= value <= MAX_ALPHA:
        raise ValueError(f"alpha is {value}; accepted values are 1 to {MAX_ALPHA:g}")


def attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    """query (batch, heads, n, width), key and value (batch, kv_heads, n, ...)."""
    dtypes(FLOATS, query=query, key=key, value=value)
    if query.ndim != 4 or key.ndim != 4 or key.shape[:3] != value.shape[:3]:
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}: want 4 axes")
    if query.shape[0] != key.shape[0] or query.shape[2:] != key.shape[2:]:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch, n or width")
    heads(query, key)
    devices(query=query, key=key, value=value)


def interaction(query: Tensor, key: Tensor, beta: Tensor, batch: int, n: int) -> None:
    """Gates: query and key (batch, n, rank), beta one number; none of them NaN."""
    dtypes(FLOATS, interaction_query=query, interaction_key=key, beta=beta)
    if query.ndim != 3 or query.shape != key.shape or query.shape[:2] != (batch, n):
        raise ValueError(
            f"interaction_query {tuple(query.shape)} and interaction_key {tuple(key.shape)}: "
            f"want ({batch}, {n}, rank) both"
        )
    gates(query, key, beta)


def gates(query: Tensor, key: Tensor, beta: Tensor) -> None:
    """What every operation asks of gates, whatever their shape."""
    if beta.numel() != 1:
        raise ValueError(f"beta has shape {tuple(beta.shape)}; want one number")
    named = {"interaction_query": query, "interaction_key": key, "beta": beta}
    devices(**named)
    for name, tensor in named.items():
        if free_to_look(tensor) and bool(tensor.isnan().any()):
            raise ValueError(f"{name} holds NaN; accepted values are finite numbers")


def free_to_look(tensor: Tensor) -> bool:
    """Whether numbers can be looked at without waiting for a device, and while nothing is being compiled."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def times(batch: int, n: int, like: Tensor, **named: Tensor) -> None:
    """Integers per key, (batch, n), beside `like`."""
    dtypes(INTEGERS, **named)
    for name, tensor in named.items():
        if tensor.shape != (batch, n):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; want (batch, n) = ({batch}, {n})")
    devices(gates=like, **named)


def drop_time(value: Tensor, query: Tensor, key: Tensor) -> None:
    """One drop time per key, or per key and key/value head."""
    dtypes(INTEGERS, drop_time=value)
    batch, kv_heads, n = query.shape[0], key.shape[1], query.shape[2]
    if value.shape not in ((batch, n), (batch, kv_heads, n)):
        raise ValueError(f"drop_time has shape {tuple(value.shape)}; want (batch, n) or (batch, kv_heads, n)")
    devices(query=query, drop_time=value)


def pattern(value: Pattern | None, query: Tensor) -> None:
    """One row of `allowed` per block of queries, every token its own key among them."""
    if value is None:
        return
    n = query.shape[2]
    if value.block < 1:
        raise ValueError(f"pattern.block is {value.block}; accepted values are 1 and more")
    wanted = (-(-n // value.block), n)
    if value.allowed.dtype != torch.bool or value.allowed.shape != wanted:
        found = f"{tuple(value.allowed.shape)} of {value.allowed.dtype}"
        raise ValueError(f"pattern.allowed is {found}; want (blocks of queries, n) = {wanted} of torch.bool")
    devices(query=query, pattern=value.allowed)
    if free_to_look(value.allowed):
        token = torch.arange(n)
        own = value.allowed[token // value.block, token]
        if not bool(own.all()):
            raise ValueError(f"pattern.allowed hides token {int(own.long().argmin())} from itself; allow every own key")


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    interaction_query: Tensor | None,
    interaction_key: Tensor | None,
    beta: Tensor | None,
    step: Tensor,
    pages: Pages,
    **times: Tensor,
) -> None:
    """One token per row: query (rows, heads, width), key and value (rows, kv_heads, width), gates (rows, rank)."""
    dtypes(FLOATS, query=query, key=key, value=value)
    dtypes(INTEGERS, step=step, **times)
    rows, kv_heads, width = len(pages.table), pages.keys.shape[1], pages.keys.shape[3]
    if query.ndim != 3 or (query.shape[0], query.shape[2]) != (rows, width):
        raise ValueError(f"query has shape {tuple(query.shape)}; want ({rows}, heads, {width}) for these pages")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != (rows, kv_heads, width):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; want ({rows}, {kv_heads}, {width}) for these pages"
            )
    heads(query, key)
    for name, tensor in {"step": step, **times}.items():
        if tensor.shape != (rows,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; want ({rows},)")
    devices(pages=pages.keys, query=query, key=key, value=value, step=step, **times)
    given = [tensor for tensor in (interaction_query, interaction_key, beta) if tensor is not None]
    if len(given) not in (0, 3):
        raise ValueError("interaction_query, interaction_key and beta: want all three or none")
    if (interaction_query is None) != (pages.interaction is None):
        raise ValueError("interaction_query: want it exactly where the pages hold interaction keys")
    if interaction_query is None or interaction_key is None or beta is None or pages.interaction is None:
        return
    wanted = (rows, pages.interaction.shape[-1])
    for name, tensor in (("interaction_query", interaction_query), ("interaction_key", interaction_key)):
        if tensor.shape != wanted:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; want {wanted} for these pages")
    dtypes(FLOATS, interaction_query=interaction_query, interaction_key=interaction_key, beta=beta)
    gates(interaction_query, interaction_key, beta)


def extend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    interaction_query: Tensor | None,
    interaction_key: Tensor | None,
    beta: Tensor | None,
    step: Tensor,
    pages: Pages,
    **times: Tensor,
) -> None:
    """Several tokens per row: what decode asks of each of them."""
    n = query.shape[2] if query.ndim == 4 else 0
    if n < 1:
        raise ValueError(f"query has shape {tuple(query.shape)}; want (rows, heads, n, width) with n of at least 1")
    for name, tensor, axis in (
        *(("key", key, 2), ("value", value, 2), ("step", step, 1)),
        *((name, tensor, 1) for name, tensor in times.items()),
        *(("interaction_query", interaction_query, 1), ("interaction_key", interaction_key, 1)),
    ):
        if tensor is not None and (tensor.ndim <= axis or tensor.shape[axis] != n):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; want {n} tokens in axis {axis}, as query has")
    gate_query = None if interaction_query is None else interaction_query[:, 0]
    gate_key = None if interaction_key is None else interaction_key[:, 0]
    first = {name: tensor[:, 0] for name, tensor in times.items()}
    token = (query[:, :, 0], key[:, :, 0], value[:, :, 0], gate_query, gate_key, beta, step[:, 0])
    decode(*token, pages, **first)


def heads(query: Tensor, key: Tensor) -> None:
    """Every key/value head serves the same number of query heads."""
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query has {query.shape[1]} heads, not a multiple of the {key.shape[1]} key/value heads")


def dtypes(accepted: tuple[torch.dtype, ...], **named: Tensor) -> None:
    """Each tensor has one of the accepted dtypes."""
    for name, tensor in named.items():
        if tensor.dtype not in accepted:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
            raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; accepted values are {names}")


def devices(**named: Tensor) -> None:
    """All on the device of the first."""
    (first, one), *others = named.items()
    for name, tensor in others:
        if tensor.device != one.device:
            raise ValueError(f"{name} is on {tensor.device}, {first} on {one.device}; want one device")
