"""Can a CPU multiply by the same weights faster? In oneDNN's own layout, which torch packs them into once.

Plain float32 products go to MKL, which on many processors reads weights at half the speed of memory and less, above all
for the few rows of a decoding step. Packed products are the same numbers up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ctxprune.errors import UserError

ROWS = 8
"""Rows that the layout is made for: those of a decoding step; it is as good for a prompt's."""


class PackedLinear(nn.Module):
    """In the place of a Linear (or of GPT-2's Conv1D): the same parameters, and packed ones for inference on a CPU.

    While gradients are recorded, on another device or in another type, it is the layer that it replaces; if the weight
    is changed, it is packed again. Optimizers that change it behind the back of its version counter are noticed where
    they are used as usual, between train() and eval().
    """

    def __init__(self, inner: nn.Linear | Conv1D):
        super().__init__()
        self.weight, self.bias = inner.weight, inner.bias
        self.transposed = isinstance(inner, Conv1D)
        self.packed: Tensor | None = None
        self.version = -1

    @property
    def matrix(self) -> Tensor:
        """(outputs, inputs)."""
        return self.weight.t() if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not _packable(self.weight) or x.dtype != torch.float32:
            return nn.functional.linear(x, self.matrix, self.bias)
        if self.packed is None or self.version != self.weight._version:
            with torch.inference_mode(False):
                matrix = self.matrix.detach().contiguous()
                self.packed = torch.ops.mkldnn._reorder_linear_weight(matrix, ROWS)
            self.version = self.weight._version
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def train(self, mode: bool = True) -> PackedLinear:
        """As of every module."""
        self.packed = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        # What is packed has no storage that could be copied; the copy packs its own.
        return self.__dict__ | {"packed": None, "version": -1}


def pack(model: nn.Module) -> nn.Module:
    """Let every linear layer of a float32 model on the CPU multiply by packed weights at inference, in place; returns
    the model. Its parameters keep their names, and it can be saved and trained as before; the packed copies take the
    memory of the weights once more.

    Raises UserError where this build of torch cannot pack.
    """
    if not torch.backends.mkldnn.is_available():
        raise UserError("this build of torch has no oneDNN: leave the model as it is")
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear | Conv1D) and _packable(child.weight):
                packed = PackedLinear(child)
                packed.train(child.training)
                setattr(parent, name, packed)
    return model


def _packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32
