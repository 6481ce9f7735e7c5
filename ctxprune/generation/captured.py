"""How does a step of a running batch reach a GPU at once? Captured as a CUDA graph while its buffers stay in place, and
played again.

A step of a small model is hundreds of launches, each of a few microseconds of work: the host is what is waited for. A
graph holds the addresses that it was captured with, so it is played while these hold and captured anew when they do not
(rows that come or go, a pool that grows).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune.cache.pruned_cache import PrunedCache
from ctxprune.ranked_calls import goes_on
from ctxprune.retrofitting import state_of, wrappers

STEADY = 2
"""Steps in a row with the same buffers before one is captured: what changes at every step is not worth it."""
Play = Callable[[], None]
Capture = Callable[[Play], Play]
"""Takes what a step does, runs its Python once without its effects on the device, and returns what has these."""


def cuda_graph(step: Play) -> Play:
    """The step as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


class StepRunner:
    """Feeds each running row's last token to a retrofitted model whose cache holds what was before it.

    On a GPU steps are captured where they can be: not under a cap, an alarm, drops that go down from layer to layer,
    or a ranking that goes on after the prompts, which all ask the device and wait.
    """

    def __init__(self, model, cache: PrunedCache, capture: Capture | None = None):
        """capture: by default cuda_graph on a GPU, and none elsewhere."""
        self.model, self.state = model, state_of(model)
        self.rankings = [wrapper.ranking for wrapper in wrappers(model) if wrapper.ranking is not None]
        on_gpu = next(model.parameters()).is_cuda
        self.capture = cuda_graph if capture is None and on_gpu else capture
        self.played = 0
        """Steps that were not run anew, all in all."""
        self.follow(cache)

    def follow(self, cache: PrunedCache) -> None:
        """From now on this is the cache of the running rows."""
        self.cache = cache
        self.play: Play | None = None
        self.captured: tuple | None = None
        """The buffers that `play` reads and writes."""
        self.moves: list[int] = []
        self.buffers: tuple = ()
        """Those of the step before, and what its layers counted of moves: these are cheap to compare."""
        self.steady = 0
        """Steps in a row with the same buffers."""

    def __call__(self, last: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """What each row's next token is picked from. Overwritten by the next step."""
        if self.capture is None or not self._may_be_captured():
            return self._forward(last)
        moves = [layer.moves for layer in self.cache.held]
        if moves != self.moves:
            before, self.moves, self.buffers = self.buffers, moves, self._buffers()
            self.steady = self.steady if before == self.buffers else 0
        self.steady += 1
        if self.play is None or self.buffers != self.captured:
            if self.steady < STEADY or not self._captured(last, self.capture):
                return self._forward(last)
            self.captured = self.buffers
        else:
            self._take_up(last)
            for layer in self.cache.held:
                layer.promised -= 1
            self.cache.seen += 1
        assert self.play is not None
        self.play()
        self.played += 1
        return self.logits

    def _forward(self, last: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        position = self.cache.lengths[:, None]
        given = {"position_ids": position, "past_key_values": self.cache, "use_cache": True}
        return self.model(last[:, None], **given).logits[:, -1]

    def _may_be_captured(self) -> bool:
        """Whether this step asks the device nothing, so that the host need not wait."""
        cache = self.cache
        if cache.max_live_tokens is not None or cache.alarm is not None or cache.reversible:
            return False
        if self.state.propagate_in_depth or not all(layer.promised > 0 for layer in cache.held):
            return False
        return not self.rankings or not (cache.reading or any(goes_on(one.config) for one in self.rankings))

    def _buffers(self) -> tuple:
        """Where the cache keeps everything that a step reads or writes."""
        tensors = [self.cache.pinned] if self.cache.pinned is not None else []
        for layer in self.cache.held:
            pages = layer.pages
            tensors += [buffer for _, _, buffer in layer.buffers()]
            tensors += [pages.table, pages.used, pages.free, pages.refused]
        return tuple((tensor.data_ptr(), *tensor.shape) for tensor in tensors)

    def _captured(self, last: Int[Tensor, " rows"], capture: Capture) -> bool:
        """Whether the step could be captured; if not, all is as it was, and none is from now on."""
        cache = self.cache
        before = (cache.length, cache.seen, [layer.promised for layer in cache.held])
        self.play = None  # its memory is free for the next
        self.last, self.length = torch.empty_like(last), torch.empty_like(cache.lengths)
        self._take_up(last)
        try:
            self.play = capture(self._step)
        except RuntimeError as error:
            cache.length, cache.seen, promised = before
            for layer, steps in zip(cache.held, promised, strict=True):
                layer.promised = steps
            self.capture = None
            warnings.warn(f"decoding goes on without CUDA graphs: {str(error).splitlines()[0]}", stacklevel=3)
            return False
        return True

    def _take_up(self, last: Int[Tensor, " rows"]) -> None:
        """The tokens and positions of this step lie where the graph reads them."""
        self.last.copy_(last)
        if self.cache.length is not self.length:  # a step in between was not played
            self.length.copy_(self.cache.lengths)
            self.cache.length = self.length

    def _step(self) -> None:
        """What is captured."""
        self.logits = self._forward(self.last)
        self.length.copy_(self.cache.lengths)
        self.cache.length = self.length
