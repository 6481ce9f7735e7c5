"""Does a compiled kernel agree with the reference on this device? A small problem, put to it before its first use.

The kernels are compiled anew for every device and by every version of its compiler, and nobody has tested them all.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ctxprune.kernels.implementations import Impl

ROOM = {
    "triton": {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3},
    "native": {torch.float32: 2e-5, torch.float64: 1e-12},
}
"""Error that is always allowed, over the largest entry; beyond it, twice the torch path's own. A type that is not here
is not taken."""

NAMES = {"triton": "Triton", "native": "the CPU kernel"}

N, WIDTH, RANK, ALPHA = 150, 64, 64, 1.5
"""Three tiles, the last of them cut; the widths that most models have."""


def agrees(operation: str, device: str, dtype: torch.dtype, impl: Impl = "triton") -> bool:
    """Whether the operation's kernel (Triton, native) has the reference's answer there: asked once per process, some
    seconds of compiling. Says no, with a warning, when it has another one or cannot run at all, and without one for
    types that it never takes."""
    return _asked(operation, device, dtype, impl)


# torch.compile is not to look inside: the answer is a constant of its graph. What torch.compiler.assume_constant_result
# does, without importing the compiler.
agrees.__dict__["_dynamo_marked_constant"] = True


@cache
def _asked(operation: str, device: str, dtype: torch.dtype, impl: Impl) -> bool:
    if dtype not in ROOM[impl]:
        return False
    if torch.device(device).type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{operation} is used for the first time while a CUDA graph is captured; call it once before"
        )
    try:
        # Whatever the caller has switched on or off: the problem needs gradients, and its own precision.
        kind = torch.device(device).type
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind, enabled=False):
            wrong = disagreement(operation, device, dtype, impl)
    except Exception as error:  # whatever the compiler or the driver raises, there is a path without them
        wrong = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if wrong:
        logging.getLogger(__name__).warning(
            "%s: torch is used on %s, not %s (%s)", operation, device, NAMES[impl], wrong
        )
    return not wrong


def disagreement(operation: str, device: str, dtype: torch.dtype, impl: Impl = "triton") -> str:
    """In words what is wrong with the kernel's results; nothing if all are right."""
    exact = _results(operation, "reference", device, dtype)
    plain, found = _results(operation, "torch", device, dtype), _results(operation, impl, device, dtype)
    for number, (wanted, rounded, result) in enumerate(zip(exact, plain, found, strict=True)):
        size = max(1.0, wanted.double().abs().max().item())
        allowed = max(2 * _distance(rounded, wanted), ROOM[impl][dtype] * size)
        error = _distance(result, wanted)
        if not error <= allowed:
            return f"result {number} is off by {error:.1e}, allowed {allowed:.1e}"
    return ""


def _distance(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().nan_to_num(torch.inf).item()


def _results(operation: str, impl: Impl, device: str, dtype: torch.dtype) -> list[Tensor]:
    """All that an operation gives on its problem, gradients included."""
    from ctxprune import kernels

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    if operation == "alpha_sigmoid":
        return [kernels.alpha_sigmoid(normal(1000), ALPHA, impl=impl)]
    query, key, value = normal(2, 4, N, WIDTH), normal(2, 2, N, WIDTH), normal(2, 2, N, WIDTH)
    # Whole numbers and a beta between them: no logit so near to 0 that rounding decides.
    gates = [torch.randint(-1, 2, (2, N, RANK), generator=generator, device="cpu").to(device, dtype) for _ in "qk"]
    beta = torch.tensor(1.5 + 1 / 16, device=device, dtype=dtype)
    if operation == "drop_times":
        return [kernels.drop_times(gates[0], gates[1], beta, impl=impl)]
    times = kernels.drop_times(gates[0], gates[1], beta, impl="reference")
    if operation == "drop_time_attention":
        return [kernels.drop_time_attention(query, key, value, times, impl=impl)]
    if operation == "pruned_attention":
        leaves = [tensor.requires_grad_() for tensor in (query, key, value, *gates, beta)]
        output, alive = kernels.pruned_attention(query, key, value, gates[0], gates[1], beta, ALPHA, impl=impl)
        loss = (output * torch.linspace(-1, 1, WIDTH, device=device)).sum() + 0.1 * alive.sum()
        return [output.detach(), alive.detach(), *torch.autograd.grad(loss, leaves)]
    pages = kernels.Pages.empty(4, 2, 2, kv_heads=2, width=WIDTH, rank=RANK, page=16, dtype=dtype, device=device)
    pages.table.copy_(torch.tensor([[3, 1], [0, 2]]))
    step_by = impl if operation == "decode_attention" else "reference"
    steps = [
        kernels.decode_attention(
            query[:, :, k], key[:, :, k], value[:, :, k], gates[0][:, k], gates[1][:, k], beta,
            torch.full((2,), k, device=device), pages, impl=step_by,
        )
        for k in range(12)
    ]  # fmt: skip
    if operation == "decode_attention":
        return [*steps, pages.drop_time]
    later = (slice(12, 17), slice(17, 32))
    chunks = [
        kernels.extend_attention(
            query[:, :, part], key[:, :, part], value[:, :, part], gates[0][:, part], gates[1][:, part], beta,
            torch.arange(part.start, part.stop, device=device).expand(2, -1), pages, impl=impl,
        )
        for part in later  # few at once, and more than are computed side by side
    ]  # fmt: skip
    return [*chunks, pages.drop_time]
