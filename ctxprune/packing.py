"""Can a CPU multiply by the same weights faster? In a library's own layout, which they are packed into once.

Plain float32 products go to MKL, which on many processors reads weights at half the speed of memory and less, above all
for the few rows of a decoding step. Two libraries know a layout of their own: oneDNN's serves any number of rows, MKL's
the one that it was made for. Which is faster differs between processors: it is measured here. Packed products are the
same numbers up to rounding.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ctxprune.errors import UserError

ROWS = 8
"""Rows that layouts are compared at: those of a decoding step. oneDNN's is made for as many; it is as good for a
prompt's."""
STEADY = 32
"""Calls with the same number of rows after which a layout of one number is made for it: what packing costs is then
about what it saves in as many calls more."""
TURNS = 5
"""How often products are timed; the fastest counts."""
SAMPLE = 1 << 28
"""Bytes of weights of one shape that are timed: more than a cache holds."""


@dataclass(frozen=True)
class Layout:
    """How a library packs a matrix (outputs, inputs) for a number of rows, and multiplies rows by it."""

    name: str
    pack: Callable[[Tensor, int], Tensor]
    product: Callable[[Tensor, PackedLinear], Tensor]
    any_rows: bool
    """Whether what is packed serves every number of rows."""


class PackedLinear(nn.Module):
    """In the place of a Linear (or of GPT-2's Conv1D): the same parameters, and packed ones for inference on a CPU.

    While gradients are recorded, on another device or in another type, it is the layer that it replaces; if the weight
    is changed or replaced, it is packed again. What changes it in place through `.data`, as some optimizers do, is
    noticed where they are used as usual, between train() and eval().
    """

    def __init__(self, inner: nn.Linear | Conv1D):
        super().__init__()
        self.weight, self.bias = inner.weight, inner.bias
        self.transposed = isinstance(inner, Conv1D)
        self.layout = ONEDNN
        self.packed: Tensor | None = None
        self.rows = 0
        """What it was packed for."""
        self.made_of: tuple = ()
        """The weight that it was packed from, where that lay, and its version."""
        self.single = True
        """Whether a single row is multiplied by packed weights too."""
        self.asked = self.calls = 0
        """Rows of the last call that found nothing packed for it, and how many such calls came one after the other."""

    @property
    def matrix(self) -> Tensor:
        """(outputs, inputs)."""
        return self.weight.t() if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not _packable(self.weight) or x.dtype != torch.float32:
            return self.plain(x)
        rows = x.numel() // x.shape[-1]
        if rows == 1 and not self.single:
            return self.plain(x)
        if not self._serves(rows):
            if not self.layout.any_rows and not self._steady(rows):
                return self.plain(x)
            self.take(self.layout, rows)
        if self.calls:  # a module's attribute is slow to set
            self.calls = 0
        return self.multiplied(x)

    def plain(self, x: Tensor) -> Tensor:
        """By the weights as they are."""
        return nn.functional.linear(x, self.matrix, self.bias)

    def multiplied(self, x: Tensor) -> Tensor:
        """By the packed ones, which have to serve its number of rows."""
        return self.layout.product(x, self)

    def take(self, layout: Layout, rows: int) -> None:
        """Pack the weights so, for this many rows."""
        with torch.inference_mode(False):
            self.packed = layout.pack(self.matrix.detach().contiguous(), rows)
        self.layout, self.rows, self.made_of = layout, rows, (self.weight, self.weight.data_ptr(), self.weight._version)

    def _serves(self, rows: int) -> bool:
        if self.packed is None or not (self.layout.any_rows or self.rows == rows):
            return False
        weight, (made_of, address, version) = self.weight, self.made_of
        return made_of is weight and address == weight.data_ptr() and version == weight._version

    def _steady(self, rows: int) -> bool:
        """Whether as many rows as now have come for long enough to pack for them."""
        self.calls = self.calls + 1 if rows == self.asked else 1
        self.asked = rows
        return self.calls > STEADY

    def train(self, mode: bool = True) -> PackedLinear:
        """As of every module."""
        if mode or self.training:
            self.packed = None
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> PackedLinear:
        # The weights go to another device or type, and maybe back.
        self.packed = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict:
        # What is packed has no storage that could be copied; the copy packs its own.
        return self.__dict__ | {"packed": None, "made_of": ()}


def _pack_by_onednn(matrix: Tensor, rows: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(matrix, ROWS)


def _by_onednn(x: Tensor, layer: PackedLinear) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, layer.packed, layer.bias, "none", [], "")


def _pack_by_mkl(matrix: Tensor, rows: int) -> Tensor:
    return torch.ops.mkl._mkl_reorder_linear_weight(matrix, rows)


def _by_mkl(x: Tensor, layer: PackedLinear) -> Tensor:
    return torch.ops.mkl._mkl_linear(x, layer.packed, layer.matrix, layer.bias, layer.rows)


ONEDNN = Layout("oneDNN", _pack_by_onednn, _by_onednn, any_rows=True)
MKL = Layout("MKL", _pack_by_mkl, _by_mkl, any_rows=False)


def pack(model: nn.Module) -> nn.Module:
    """Let every plain linear layer of a float32 model on the CPU multiply by packed weights at inference, in place;
    returns the model. Its parameters keep their names, and it can be saved and trained as before; the packed copies
    take the memory of the weights once more. Layouts are timed, all layers of a shape after each other, a few times as
    long as a step of the model takes: the faster one for ROWS rows is taken, and a single row is multiplied by it or by
    the weights as they are, whichever is faster. MKL's is made once a number of rows has come for STEADY calls; other
    calls are multiplied by the weights as they are.

    Raises UserError where this build of torch cannot pack.
    """
    if not torch.backends.mkldnn.is_available():
        raise UserError("this build of torch has no oneDNN: leave the model as it is")
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear | Conv1D) and _replaceable(child):
                packed = PackedLinear(child)
                packed.train(child.training)
                setattr(parent, name, packed)
    shapes: dict[torch.Size, list[PackedLinear]] = defaultdict(list)
    for layer in model.modules():
        if isinstance(layer, PackedLinear) and _packable(layer.weight):
            shapes[layer.matrix.shape].append(layer)
    for layers in shapes.values():
        some = layers[: 1 + SAMPLE // (layers[0].weight.numel() * layers[0].weight.element_size())]
        layout = faster_layout(some) if torch.backends.mkl.is_available() else ONEDNN
        single = packed_is_faster(some, layout)
        for layer in layers:
            layer.layout, layer.packed, layer.single = layout, None, single
    return model


@torch.no_grad()
def faster_layout(layers: list[PackedLinear]) -> Layout:
    """Which layout multiplies ROWS rows by these layers of one shape faster: each layer in turn, as a model calls them,
    so that weights come from where they will come from. Both are timed in turns."""
    held = {}
    for layout in (ONEDNN, MKL):
        for layer in layers:
            layer.take(layout, ROWS)
        held[layout] = [layer.packed for layer in layers]
    seconds: dict[Layout, list[float]] = {ONEDNN: [], MKL: []}
    for _ in range(TURNS):
        for layout, packed in held.items():
            for layer, weights in zip(layers, packed, strict=True):
                layer.layout, layer.packed = layout, weights
            seconds[layout].append(_seconds(PackedLinear.multiplied, layers, ROWS))
    return min(seconds, key=lambda layout: min(seconds[layout]))


@torch.no_grad()
def packed_is_faster(layers: list[PackedLinear], layout: Layout) -> bool:
    """Whether these layers of one shape take a single row faster packed so."""
    plain, packed = [], []
    for layer in layers:
        layer.take(layout, 1)
    for _ in range(TURNS):
        plain.append(_seconds(PackedLinear.plain, layers, 1))
        packed.append(_seconds(PackedLinear.multiplied, layers, 1))
    return min(packed) <= min(plain)


def _seconds(product: Callable[[PackedLinear, Tensor], Tensor], layers: Iterable[PackedLinear], rows: int) -> float:
    x = torch.zeros(rows, next(iter(layers)).matrix.shape[1])
    start = time.perf_counter()
    for layer in layers:
        product(layer, x)
    return time.perf_counter() - start


def _replaceable(child: nn.Linear | Conv1D) -> bool:
    """Whether it is a linear layer and nothing more: neither one with ways of its own nor one that somebody watches."""
    watched = child._forward_hooks or child._forward_pre_hooks or child._backward_hooks
    return type(child) in (nn.Linear, Conv1D) and _packable(child.weight) and not watched


def _packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.is_inference()
