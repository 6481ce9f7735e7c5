"""Can a CPU multiply by the same weights faster? In oneDNN's own layout, which torch packs them into once.

Plain float32 products go to MKL, which on many processors reads weights at half the speed of memory and less, above all
for the few rows of a decoding step. For a single row it is the faster one on others: which it is here is measured.
Packed products are the same numbers up to rounding.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ctxprune.errors import UserError

ROWS = 8
"""Rows that the layout is made for: those of a decoding step; it is as good for a prompt's."""
TURNS = 5
"""How often both products are timed; the fastest counts, and the first, which packs, hardly can be that."""


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
        self.single = True
        """Whether a single row is multiplied by packed weights too."""

    @property
    def matrix(self) -> Tensor:
        """(outputs, inputs)."""
        return self.weight.t() if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not _packable(self.weight) or x.dtype != torch.float32:
            return self.plain(x)
        if not self.single and x.numel() == x.shape[-1]:
            return self.plain(x)
        return self.multiplied(x)

    def plain(self, x: Tensor) -> Tensor:
        """By the weights as they are."""
        return nn.functional.linear(x, self.matrix, self.bias)

    def multiplied(self, x: Tensor) -> Tensor:
        """By the packed ones."""
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
    memory of the weights once more. Single rows are timed, all layers of a shape after each other, a few times as long
    as a step of the model takes: they are multiplied by whichever weights are faster.

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
    shapes: dict[torch.Size, list[PackedLinear]] = defaultdict(list)
    for layer in model.modules():
        if isinstance(layer, PackedLinear) and _packable(layer.weight):
            shapes[layer.matrix.shape].append(layer)
    for layers in shapes.values():
        single = packed_is_faster(layers)
        for layer in layers:
            layer.single = single
    return model


@torch.no_grad()
def packed_is_faster(layers: list[PackedLinear]) -> bool:
    """Whether these layers of one shape take a single row faster packed: each in turn, as a model calls them, so that
    weights come from where they will come from."""
    row = torch.zeros(1, layers[0].matrix.shape[1])
    plain, packed = [], []
    for _ in range(TURNS):
        plain.append(_seconds(PackedLinear.plain, layers, row))
        packed.append(_seconds(PackedLinear.multiplied, layers, row))
    return min(packed) <= min(plain)


def _seconds(product: Callable[[PackedLinear, Tensor], Tensor], layers: Iterable[PackedLinear], row: Tensor) -> float:
    start = time.perf_counter()
    for layer in layers:
        product(layer, row)
    return time.perf_counter() - start


def _packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32
