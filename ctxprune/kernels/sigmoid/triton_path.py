"""How is the exact alpha-sigmoid computed on a GPU? One elementwise Triton kernel; its device code serves attention."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from ctxprune.kernels.ahead_of_time import Shipped
from ctxprune.kernels.checks import Refused
from ctxprune.kernels.sigmoid.triton_ops import family, log2_gate

BLOCK = 1024
"""Numbers per program: 8 a thread, enough to hide the latency of one load."""


@triton.jit
def sigmoid_kernel(
    x, gate, derivative, count, e, FLAT: tl.constexpr, STEPS: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr
):
    """gate = sigma_alpha(x) and its derivative; all three float32, contiguous, `count` numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = place < count
    log_gate, slope = log2_gate(tl.load(x + place, mask=here, other=0.0), e, FLAT, STEPS, PTX)
    value = tl.exp2(log_gate)
    tl.store(gate + place, value, mask=here)
    tl.store(derivative + place, value * slope, mask=here)


def alpha_sigmoid(x: Tensor, alpha: float) -> Tensor:
    """Keep probability sigma_alpha(x) with its derivative for autograd; x: any shape, float32 or below, computed in
    float32. Raises ValueError for float64, and for a device that has no Triton."""
    check_device(x)
    if x.dtype == torch.float64:
        raise Refused("x is float64: Triton computes in float32; take impl='torch'")
    return _AlphaSigmoid.apply(x, alpha)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors (TRITON_INTERPRET=1 when they were imported)."""
    return isinstance(sigmoid_kernel, InterpretedFunction)


def has_ptx() -> bool:
    """Whether inline PTX can be used: compiled for NVIDIA."""
    return not interpreted() and torch.version.hip is None


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as three products of TF32 where the inputs are float32, which errs no more than
    float32 itself; as one where they are rounded more coarsely already. AMD has no TF32."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def check_device(tensor: Tensor) -> None:
    """Raises ValueError unless kernels can run on the tensor's device."""
    if tensor.device.type != "cuda" and not (tensor.device.type == "cpu" and interpreted()):
        raise Refused(f"Triton kernels need a CUDA device, this is {tensor.device.type}; take impl='torch'")


def on_device(tensor: Tensor):
    """Launch on the tensor's GPU, not on the current one."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


class _AlphaSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, alpha: float) -> Tensor:
        flat = x.detach().float().contiguous()
        gate, derivative = torch.empty_like(flat), torch.empty_like(flat)
        count = flat.numel()
        if count:
            with on_device(x):
                sigmoid_kernel[(triton.cdiv(count, BLOCK),)](
                    flat, gate, derivative, count, alpha - 1.0, **family(alpha), PTX=has_ptx(), BLOCK=BLOCK
                )
        ctx.save_for_backward(derivative)
        return gate.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (derivative,) = ctx.saved_tensors
        return (gradient * derivative).to(gradient.dtype), None


def shipped() -> list[Shipped]:
    """The four variants that a schedule of alpha from 1 to 16 runs through."""
    signature = {"x": "*fp32", "gate": "*fp32", "derivative": "*fp32", "count": "i32", "e": "fp32"}
    return [
        Shipped(
            f"sigmoid alpha={alpha}", sigmoid_kernel, signature, {**family(alpha), "PTX": True, "BLOCK": BLOCK}, 4, 3
        )
        for alpha in (1.0, 1.5, 3.0, 8.0)
    ]
