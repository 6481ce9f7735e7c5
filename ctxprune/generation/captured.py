"""How does a step of a running batch reach a GPU at once? Captured as a CUDA graph while its buffers stay in place, and
played again.

A step of a small model is hundreds of launches, each of a few microseconds of work: the host is what is waited for. A
graph holds the addresses that it was captured with, so it is played while these hold and captured anew when they do not
(rows that come or go, a pool that grows).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune import kernels
from ctxprune.cache.pruned_cache import PrunedCache
from ctxprune.ranked_calls import goes_on
from ctxprune.retrofitting import state_of, wrappers

STEADY = 2
"""Steps in a row with the same buffers before one is captured: what changes at every step is not worth it."""
WORTH = 8
"""Steps that all rows must have room for then: a capture costs some steps."""
Play = Callable[[], None]
Capture = Callable[[Play], Play]
"""Takes what a step does, runs its Python once without its effects on the device, and returns what has these."""


def cuda_graph(device: torch.device, step: Play) -> Play:
    """The step as a CUDA graph. Raises RuntimeError where something in it would have to wait."""
    before, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
    try:
        # A stream of this device, whichever is the current one.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
            step()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own
    return graph.replay


class StepRunner:
    """Feeds each running row's last token to a retrofitted model whose cache holds what was before it.

    On a GPU steps are captured where they can be: not under a cap, an alarm, drops that go down from layer to layer, a
    ranking that goes on after the prompts, or without Triton, which all ask the device and wait; not under autocast,
    whose copies of weights come and go; and not where hooks want to see each step.
    """

    def __init__(self, model, cache: PrunedCache, capture: Capture | None = None):
        """capture: by default cuda_graph on a GPU, and none elsewhere."""
        self.model, self.state = model, state_of(model)
        device = next(model.parameters()).device
        self.capture = partial(cuda_graph, device) if capture is None and device.type == "cuda" else capture
        self.only_by_triton = capture is None
        self.played = 0
        """Steps that were not run anew, all in all."""
        self.weights: list[int] = []
        self.hooked = False
        self.follow(cache)

    def follow(self, cache: PrunedCache) -> None:
        """From now on this is the cache of the running rows."""
        self.cache = cache
        self.play: Play | None = None
        self.captured: tuple | None = None
        """The buffers that `play` reads and writes."""
        self.counted: list = []
        self.buffers: tuple = ()
        """Those of the step before, and what its layers counted of moves: these are cheap to compare."""
        self.steady = 0
        """Steps in a row with the same buffers."""
        self.look_at_the_model()

    def look_at_the_model(self) -> None:
        """It may be another than before: other weights, hooks. Asked whenever somebody else had the word."""
        if self.capture is not None:
            weights = [parameter.data_ptr() for parameter in self.model.parameters()]
            if weights != self.weights:
                self.weights, self.play = weights, None
            self.hooked = any(part._forward_hooks or part._forward_pre_hooks for part in self.model.modules())

    def __call__(self, last: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """What each row's next token is picked from. Overwritten by the next step."""
        if self.capture is None or not self._may_be_captured():
            return self._forward(last)
        cache = self.cache
        counted = [(id(layer), layer.moves) for layer in cache.held] + [(id(cache.pinned), 0)]
        if counted != self.counted:
            before, self.counted, self.buffers = self.buffers, counted, self._buffers()
            self.steady = self.steady if before == self.buffers else 0
        self.steady += 1
        if self.play is None or self.buffers != self.captured:
            steps = min(layer.promised for layer in cache.held)
            if self.steady < STEADY or steps < WORTH or not self._captured(last, self.capture):
                return self._forward(last)
            self.captured = self.buffers
        else:
            self._take_up(last)
            for layer in cache.held:
                layer.promised -= 1
            cache.seen += 1
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
        cache, state = self.cache, self.state
        if not state.graphs or self.hooked or torch.is_autocast_enabled(cache.lengths.device.type):
            return False
        if cache.max_live_tokens is not None or cache.alarm is not None or cache.reversible or state.propagate_in_depth:
            return False
        ranked = [wrapper.ranking.config for wrapper in wrappers(self.model) if wrapper.ranking is not None]
        if ranked and (cache.reading or any(goes_on(config) for config in ranked)):
            return False
        if all(layer.promised > 0 for layer in cache.held):
            return True
        if cache.max_bytes is None:
            for layer in cache.held:  # who asks now asks for all, or layers would ask in turn
                layer.promised = 0
        return False

    def _buffers(self) -> tuple:
        """Where the cache keeps everything that a step reads or writes."""
        tensors = [self.cache.pinned] if self.cache.pinned is not None else []
        for layer in self.cache.held:
            pages = layer.pages
            tensors += [buffer for _, _, buffer in layer.buffers()]
            tensors += [pages.table, pages.used, pages.free, pages.refused]
        return tuple((tensor.data_ptr(), *tensor.shape) for tensor in tensors)

    def _captured(self, last: Int[Tensor, " rows"], capture: Capture) -> bool:
        """Whether the step could be captured; if not, all is as it was, and none of this model is from now on."""
        cache = self.cache
        pages = cache.held[0].pages
        rank = 0 if pages.interaction is None else pages.interaction.shape[2]
        sizes = pages.keys.shape[3], cache.page, rank
        if self.only_by_triton and not kernels.decodes_by_triton(last.device, self.model.dtype, *sizes):
            self.state.graphs = False
            return False
        length, seen, promised = cache.length, cache.seen, [layer.promised for layer in cache.held]
        self.play = None  # its memory is free for the next
        self.last, self.length = torch.empty_like(last), torch.empty_like(cache.lengths)
        try:
            self._take_up(last)
            self.play = capture(self._step)
        except BaseException as error:
            cache.length, cache.seen, self.state.graphs = length, seen, False
            for layer, steps in zip(cache.held, promised, strict=True):
                layer.promised = steps
            if not isinstance(error, RuntimeError):
                raise
            said = str(error).splitlines()[:1] or [type(error).__name__]
            warnings.warn(f"decoding goes on without CUDA graphs: {said[0]}", stacklevel=3)
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
