"""Does a compiled kernel agree with the reference on this device? A small problem, put to it before its first use.

The kernels are compiled anew for every device and by every version of its compiler, and nobody has tested them all.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ctxprune.kernels.checks import Refused

if TYPE_CHECKING:
    from ctxprune.kernels.implementations import Impl

ROOM = {
    "triton": {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3},
    "native": {torch.float32: 2e-5, torch.float64: 1e-12},
}
"""Error that is always allowed, over the largest entry; beyond it, twice the torch path's own. A type that is not here
is not taken."""

NAMES = {"triton": "Triton", "native": "the CPU kernel"}

N, CUT, ALPHA = 150, 100, 1.5
"""Three tiles, the last of them cut; fewer where they are also read in segments."""
SEGMENT = 32
"""Rows per segment there: longer texts are read in several, of which later ones see what is left of earlier ones."""


class Sizes(NamedTuple):
    """What decides beside the type whether a kernel fits a device. width: of heads; rank: of interactions; page: slots.
    Kernels pad to powers of two; what is smaller than these fits where these do."""

    width: int = 64
    rank: int = 64
    page: int = 16

    @classmethod
    def of(cls, width: int, rank: int, page: int) -> Sizes:
        width, rank = (max(64, 1 << (number - 1).bit_length()) if number else 64 for number in (width, rank))
        return cls(width, rank, page)


def agrees(
    operation: str,
    device: str,
    dtype: torch.dtype,
    impl: Impl = "triton",
    width: int = 0,
    rank: int = 0,
    page: int = 16,
) -> bool:
    """Whether the operation's kernel (Triton, native) has the reference's answer there: asked once per process and
    sizes, some seconds of compiling. Says no, with a warning, when it has another one or cannot run at all, and without
    one for types and sizes that it never takes. width, rank: of heads and interactions, 0 where there are none."""
    return _asked(operation, device, dtype, impl, Sizes.of(width, rank, page))


# torch.compile is not to look inside: the answer is a constant of its graph. What torch.compiler.assume_constant_result
# does, without importing the compiler.
agrees.__dict__["_dynamo_marked_constant"] = True


@cache
def _asked(operation: str, device: str, dtype: torch.dtype, impl: Impl, sizes: Sizes) -> bool:
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
            wrong = disagreement(operation, device, dtype, impl, sizes)
    except Exception as error:  # whatever the compiler or the driver raises, there is a path without them
        if impl == "triton" and isinstance(error, Refused):  # of a size it never takes
            return False
        wrong = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if wrong:
        logging.getLogger(__name__).warning(
            "%s: torch is used on %s, not %s (%s)", operation, device, NAMES[impl], wrong
        )
    return not wrong


def disagreement(
    operation: str, device: str, dtype: torch.dtype, impl: Impl = "triton", sizes: Sizes | None = None
) -> str:
    """In words what is wrong with the kernel's results; nothing if all are right. Times are right or wrong, whatever
    the type."""
    given = device, dtype, sizes or Sizes()
    exact, plain, found = (_results(operation, way, *given) for way in ("reference", "torch", impl))
    for number, (wanted, rounded, result) in enumerate(zip(exact, plain, found, strict=True)):
        if not wanted.is_floating_point():
            if not torch.equal(result.long(), wanted.long()):
                return f"result {number} has other times in {int((result.long() != wanted.long()).sum())} places"
            continue
        size = max(1.0, wanted.double().abs().max().item())
        allowed = max(2 * _distance(rounded, wanted), ROOM[impl][dtype] * size)
        error = _distance(result, wanted)
        if not error <= allowed:
            return f"result {number} is off by {error:.1e}, allowed {allowed:.1e}"
    return ""


def _distance(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().nan_to_num(torch.inf).item()


def _results(operation: str, impl: Impl, device: str, dtype: torch.dtype, sizes: Sizes) -> list[Tensor]:
    """All that an operation gives on its problem, gradients included."""
    from ctxprune import kernels

    generator = torch.Generator().manual_seed(0)
    width, rank, page = sizes
    # Decoding goes on over the end of a page.
    paged = operation in ("decode_attention", "extend_attention")
    steps, n = page + 4, page + 24 if paged else N

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    if operation == "alpha_sigmoid":
        return [kernels.alpha_sigmoid(normal(1000), ALPHA, impl=impl)]
    query, key, value = normal(2, 4, n, width), normal(2, 2, n, width), normal(2, 2, n, width)
    # Whole numbers and a beta between them: no logit so near to 0 that rounding decides.
    gates = [torch.randint(-1, 2, (2, n, rank), generator=generator, device="cpu").to(device, dtype) for _ in "qk"]
    beta = torch.tensor(1.5 + 1 / 16, device=device, dtype=dtype)
    if operation == "drop_times":
        return [kernels.drop_times(gates[0], gates[1], beta, impl=impl)]
    times = kernels.drop_times(gates[0], gates[1], beta, impl="reference")
    if operation == "drop_time_attention":
        return [kernels.drop_time_attention(query, key, value, times, impl=impl)]
    if operation == "pruned_attention":
        given = [query, key, value, *gates, beta]
        cut = [tensor[..., :CUT, :] if tensor.ndim else tensor for tensor in given]
        return [*_learned(given, impl), *_learned(cut, impl, segment=SEGMENT)]
    pages = kernels.Pages.empty(6, 2, 3, kv_heads=2, width=width, rank=rank, page=page, dtype=dtype, device=device)
    pages.table.copy_(torch.tensor([[3, 1, 4], [0, 5, 2]]))
    step_by = impl if operation == "decode_attention" else "reference"
    single = [
        kernels.decode_attention(
            query[:, :, k], key[:, :, k], value[:, :, k], gates[0][:, k], gates[1][:, k], beta,
            torch.full((2,), k, device=device), pages, impl=step_by,
        )
        for k in range(steps)
    ]  # fmt: skip
    if operation == "decode_attention":
        return [*single, pages.drop_time]
    later = (slice(steps, steps + 5), slice(steps + 5, n))
    chunks = [
        kernels.extend_attention(
            query[:, :, part], key[:, :, part], value[:, :, part], gates[0][:, part], gates[1][:, part], beta,
            torch.arange(part.start, part.stop, device=device).expand(2, -1), pages, impl=impl,
        )
        for part in later  # few at once, and more than are computed side by side
    ]  # fmt: skip
    return [*chunks, pages.drop_time]


def _learned(given: list[Tensor], impl: Impl, segment: int | None = None) -> list[Tensor]:
    """Output, alive and the gradients of a pass that is trained on. segment: as Triton reads longer texts."""
    from ctxprune import kernels

    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    query, key, value, gate_query, gate_key, beta = leaves
    gates = gate_query, gate_key, beta, ALPHA
    if segment is None or impl != "triton":
        output, alive = kernels.pruned_attention(query, key, value, *gates, impl=impl)
    else:
        from ctxprune.kernels.soft_attention import triton_path

        batch, n, _ = gate_query.shape
        first = torch.arange(1, n + 1, device=query.device).expand(batch, n)
        end, scale = torch.full_like(first, n), query.shape[-1] ** -0.5
        output, alive = triton_path.pruned_attention(query, key, value, *gates, first, end, scale, segment=segment)
    ramp = torch.linspace(-1, 1, given[0].shape[-1], device=given[0].device)
    loss = (output * ramp).sum() + 0.1 * alive.sum()
    return [output.detach(), alive.detach(), *torch.autograd.grad(loss, leaves)]
