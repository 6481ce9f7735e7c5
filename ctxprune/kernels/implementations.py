"""Which code implements each operation, and which of it runs where?"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ctxprune.kernels import agreement, checks
from ctxprune.kernels.decode import native_path, torch_extend
from ctxprune.kernels.decode import reference as decode_reference
from ctxprune.kernels.decode import torch_path as decode_torch
from ctxprune.kernels.hard_attention import reference as hard_reference
from ctxprune.kernels.hard_attention import torch_path as hard_torch
from ctxprune.kernels.liveness import reference as times_reference
from ctxprune.kernels.liveness import torch_path as times_torch
from ctxprune.kernels.sigmoid import reference as sigmoid_reference
from ctxprune.kernels.sigmoid import torch_path as sigmoid_torch
from ctxprune.kernels.soft_attention import reference as soft_reference
from ctxprune.kernels.soft_attention import torch_path as soft_torch

Impl = Literal["auto", "reference", "torch", "native", "triton"]


# Triton may be missing, and is imported by the first call; in words that torch.compile can follow.
def _triton_alpha_sigmoid(*arguments):
    from ctxprune.kernels.sigmoid import triton_path

    return triton_path.alpha_sigmoid(*arguments)


def _triton_pruned_attention(*arguments):
    from ctxprune.kernels.soft_attention import triton_path

    return triton_path.pruned_attention(*arguments)


def _triton_drop_times(*arguments):
    from ctxprune.kernels.liveness import triton_path

    return triton_path.drop_times(*arguments)


def _triton_drop_time_attention(*arguments):
    from ctxprune.kernels.hard_attention import triton_path

    return triton_path.drop_time_attention(*arguments)


def _triton_decode_attention(*arguments):
    from ctxprune.kernels.decode import triton_path

    return triton_path.decode_attention(*arguments)


IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {
    "alpha_sigmoid": {
        "reference": sigmoid_reference.alpha_sigmoid,
        "torch": sigmoid_torch.alpha_sigmoid,
        "triton": _triton_alpha_sigmoid,
    },
    "pruned_attention": {
        "reference": soft_reference.pruned_attention,
        "torch": soft_torch.pruned_attention,
        "triton": _triton_pruned_attention,
    },
    "drop_times": {
        "reference": times_reference.drop_times,
        "torch": times_torch.drop_times,
        "triton": _triton_drop_times,
    },
    "drop_time_attention": {
        "reference": hard_reference.drop_time_attention,
        "torch": hard_torch.drop_time_attention,
        "triton": _triton_drop_time_attention,
    },
    "decode_attention": {
        "reference": decode_reference.decode_attention,
        "torch": decode_torch.decode_attention,
        "native": native_path.decode_attention,
        "triton": _triton_decode_attention,
    },
    "extend_attention": {
        "reference": decode_reference.extend_attention,
        "torch": torch_extend.extend_attention,
        "native": native_path.extend_attention,
    },
}


def run(operation: str, impl: Impl, *arguments: Any) -> Any:
    """Call one implementation; impl="auto" is Triton on a GPU and native on a CPU, where it has agreed with the
    reference, else torch.

    Raises ValueError for an implementation that the operation does not have.
    """
    available = IMPLEMENTATIONS[operation]
    if impl == "auto":
        if "triton" in available and _is_on_a_gpu(arguments[0]) and _agrees(operation, arguments):
            try:
                return available["triton"](*arguments)
            except checks.Refused:  # a type or a width that Triton does not take: torch takes all
                pass
        elif "native" in available and arguments[0].is_cpu and not _is_on_a_gpu(arguments[0]):
            return as_written(_native_else_torch)(operation, *arguments)
        impl = "torch"
    if impl not in available:
        raise ValueError(f"impl={impl!r}: {operation} has {', '.join(['auto', *available])}")
    if impl != "triton":
        return as_written(available[impl])(*arguments)
    if not torch.compiler.is_compiling() and not _installed():
        raise ValueError("impl='triton': the package triton is not installed; take impl='torch'")
    return available["triton"](*arguments)


def decodes_by_triton(device: torch.device, dtype: torch.dtype, width: int, page: int, rank: int = 0) -> bool:
    """Whether a decoding step there, of heads of this width and gates of this rank (0: none) over pages of this size,
    is Triton's, which asks the GPU nothing; torch's does."""
    if device.type != "cuda" or not _installed():
        return False
    from ctxprune.kernels.decode import triton_path

    taken = triton_path.takes(width, dtype, page, rank)
    return taken and agreement.agrees("decode_attention", str(device), dtype, "triton", width, rank, page)


def _agrees(operation: str, arguments: tuple) -> bool:
    """Whether Triton is right about arguments of this device, type and size."""
    width, rank, page = arguments[0].shape[-1], 0, 16
    if operation == "alpha_sigmoid":
        width = 0
    elif operation == "drop_times":
        width, rank = 0, width
    elif operation != "drop_time_attention":
        rank = 0 if arguments[3] is None else arguments[3].shape[-1]
    if operation == "decode_attention":
        page = arguments[9].page
    return agreement.agrees(operation, *_kind(arguments), "triton", width, rank, page)


def _native_else_torch(operation: str, *arguments: Any) -> Any:
    """One function, so that torch.compile leaves it alone as a whole: it cannot follow an exception out of one."""
    ways = IMPLEMENTATIONS[operation]
    if not native_path.switched_off() and agreement.agrees(operation, *_kind(arguments), "native"):
        try:
            return ways["native"](*arguments)
        except checks.Refused:  # mixed types, gradients: torch takes all
            pass
    return ways["torch"](*arguments)


def as_written(function: Callable) -> Callable:
    """What torch.compile must leave alone: loops whose lengths depend on numbers, and gates that its CPU code gets
    wrong (expm1 as exp - 1, an exponent frozen at its first value). It compiles what lies before and behind."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


def _is_on_a_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _kind(arguments: tuple) -> tuple[str, torch.dtype]:
    """Device and type of the first argument: what agreement is asked about."""
    return str(arguments[0].device), arguments[0].dtype


def describe() -> list[dict[str, object]]:
    """One record per operation and implementation: whether it runs here, and why (not).

    On a GPU this puts a small problem to every Triton kernel, as its first use would: some seconds of compiling.
    """
    records: list[dict[str, object]] = []
    for operation, implementations in IMPLEMENTATIONS.items():
        for name in implementations:
            available, reason = _state(operation, name)
            records.append({"operation": operation, "implementation": name, "available": available, "reason": reason})
    return records


def _state(operation: str, name: str) -> tuple[bool, str]:
    cuda = torch.cuda.is_available()
    if name == "reference":
        return True, "float64, for tests"
    if name == "torch":
        where = "CUDA and CPU" if cuda else "CPU (no CUDA device)"
        return True, f"{where}, float64/float32/bfloat16/float16"
    if name == "native":
        reason = native_path.available()
        return not reason, reason or "CPU, float64/float32; compiled at its first use"
    if not _installed():
        return False, "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, "interpreted in Python (TRITON_INTERPRET=1), for tests"
    if not cuda:
        return False, "no CUDA device; TRITON_INTERPRET=1 interprets it, slowly"
    if not agreement.agrees(operation, "cuda:0", torch.bfloat16):
        return False, "disagrees with the reference on this GPU (see the warning): auto takes torch"
    return True, "CUDA, float32/bfloat16/float16; agrees with the reference on this GPU"
