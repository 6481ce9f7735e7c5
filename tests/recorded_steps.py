"""What would a CUDA graph do? The same on a CPU: the operations of a step are taken down without their effects, with
the memory that they read and write, and played again there. What would make the host wait for a GPU is refused, or
counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ctxprune import kernels

ASKING = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2"}
"""Operations whose answer, or its size, goes to the host."""


def asks(function, args: tuple) -> bool:
    """Whether the host would wait for this one. New tensors of numbers of the host (lift_fresh) are copied to a GPU,
    which waits too."""
    name = function.overloadpacket.__name__
    if name in ASKING or name == "lift_fresh" or (name == "repeat_interleave" and function._overloadname == "Tensor"):
        return True
    indices = args[1] if name in ("index", "index_put", "index_put_") else []
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


class Leaving(TorchFunctionMode):
    """What takes a tensor's numbers to the host without an operation, where the tensor is there already."""

    def __init__(self, told: Callable[[str], None]) -> None:
        super().__init__()
        self.told = told

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            self.told(function.__name__)
        return function(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts how often the host would wait."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += asks(function, args)
        return function(*args, **(kwargs or {}))

    def left(self, name: str) -> None:
        self.count += 1


class Recorder(TorchDispatchMode):
    """Takes a step down. Afterwards all memory from before it is as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, object]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple] = {}

    def refuse(self, name: str) -> None:
        raise RuntimeError(f"{name} is not permitted when a step is captured")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if asks(function, args):
            self.refuse(str(function))
        for place, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                self.spare(given)
        out = function(*args, **kwargs)
        self.take_down(function, args, kwargs, out)
        return out

    def take_down(self, function: Callable, args: tuple, kwargs: dict, out: object) -> None:
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        fresh = {tensor.untyped_storage().data_ptr() for tensor in tensors(out)} - given
        self.made |= fresh
        self.calls.append((function, args, kwargs, out if fresh else None))

    def spare(self, given: object) -> None:
        for tensor in tensors(given):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.made:
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def restore(self) -> None:
        for storage, content in self.before.values():
            storage.copy_(content)

    def play(self) -> None:
        """Every operation again, on the very memory that it had."""
        for function, args, kwargs, out in self.calls:
            found = function(*args, **kwargs)
            if out is not None:
                for old, new in zip(tensors(out), tensors(found), strict=True):
                    old.copy_(new)


def tensors(of: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(of) if isinstance(leaf, Tensor)]


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """In the place of captured.cuda_graph."""
    recorder = Recorder()
    RECORDING.append(recorder)
    try:
        with Leaving(recorder.refuse), recorder:
            step()
    finally:
        RECORDING.pop()
        recorder.restore()
    return recorder.play


RECORDING: list[Recorder] = []
"""The recorder at work, if one is."""


@contextmanager
def one_kernel(monkeypatch) -> Iterator[None]:
    """The attention over pages is one operation, as the kernels of a GPU are, and finds what it needs by itself; gates
    are computed by torch, as there."""
    original = kernels.decode_attention

    def attention(*args, **kwargs):
        with _disable_current_modes():
            return original(*args, **kwargs)

    def taken_down(*args, **kwargs):
        if not RECORDING:
            return attention(*args, **kwargs)
        recorder, pages = RECORDING[-1], args[7]
        # These buffers, whatever the pool has later; their order is not known to a kernel.
        there = replace(pages, order=None, next=None)
        given = (*args[:7], there)
        with _disable_current_modes():
            recorder.spare([value for value in vars(there).values() if isinstance(value, Tensor)])
            out = original(*given, **kwargs)
            recorder.take_down(original, given, kwargs, out)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "decode_attention", taken_down)
        patch.setattr("ctxprune.gate.interactions", lambda *_: None)
        yield
