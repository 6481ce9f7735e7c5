"""What does a layer do in a stream that gets shorter? It lets tokens go, then runs unchanged on those that are left.

A wrapper module around the model's own layer: what the layer is told about each token (position, mask) is gathered as
its state is.
"""

from __future__ import annotations

import inspect
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from ctxprune.errors import UserError
from ctxprune.hidden_pruning import stream as hidden_stream
from ctxprune.hidden_pruning.prompt import Prompt, mark, over
from ctxprune.hidden_pruning.schedule import HiddenPruningConfig
from ctxprune.hidden_pruning.stream import Stream, Watch, taken, tokens_there
from ctxprune.policies.budget import chosen
from ctxprune.policies.scorer import hashed
from ctxprune.precision import exactly

CACHES = ("past_key_values", "layer_past")
"""What layers of transformers call their cache."""


@dataclass(frozen=True)
class PassStats:
    """What one pass dropped. requested: the shares asked for, empty under thresholds; kept: the tokens that entered
    each layer; seconds: time of the host spent on scoring and choosing."""

    requested: tuple[float, ...]
    kept: Bool[Tensor, "layers batch n"]
    seconds: float

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of all rows that entered each layer, padding left out."""
        return tuple(self.kept.sum((1, 2)).tolist())

    @property
    def achieved(self) -> tuple[float, ...]:
        """The share of all tokens that entered each layer: above what was asked by rounding up and by protection."""
        tokens = self.tokens
        return tuple(count / max(1, tokens[0]) for count in tokens)


@dataclass
class HiddenPruning:
    """What the wrapped layers of one model share."""

    config: HiddenPruningConfig
    causal: bool
    on: bool = True
    stats: PassStats | None = None
    """Of the last pass over whole rows; None if there was none yet or it was dense."""
    stream: Stream | None = None
    """The pass in flight; None if it is dense."""
    prompts: weakref.WeakKeyDictionary[Cache, Prompt] = field(default_factory=weakref.WeakKeyDictionary)

    def begin(self, hidden: Tensor, mask: Tensor | None, causal: bool) -> None:
        """A new pass over whole rows, before its first layer."""
        self.stats = self.stream = None
        if not self.on:
            return
        there = tokens_there(mask, hidden)
        rank, length = there.cumsum(1) - 1, there.sum(1, keepdim=True)
        first = max(self.config.protect_first, 0 if causal else 1)
        last = max(self.config.protect_last, 1 if causal else 0)
        self.stream = Stream(there, there & ((rank < first) | (rank >= length - last)), causal)

    @torch.no_grad()
    def stays(self, layer: int, hidden: Float[Tensor, "batch tokens width"], stream: Stream) -> Tensor:
        """Which tokens of the stream enter the layer, (batch, tokens)."""
        alive = stream.alive
        protected = stream.protected.gather(1, stream.column) & alive
        score, budget = self.score(hidden, stream), self.config.budget(layer)
        # Sequences that decide as one: a single head.
        heads = (score[:, None], alive[:, None], protected[:, None])
        return chosen(budget, *heads, stream.length, layer, self.config.layers)[:, 0]

    def score(self, hidden: Float[Tensor, "batch tokens width"], stream: Stream) -> Float[Tensor, "batch tokens"]:
        """Higher = stays."""
        if self.config.score == "random":
            return hashed((stream.there.cumsum(1) - 1).gather(1, stream.column), self.config.seed)
        if self.config.score == "norm":
            return exactly(hidden).norm(dim=-1)
        assert stream.watch is not None
        if stream.watch.received is None:
            raise UserError("this model's layers do not hand keywords on to their attention: take score=norm or random")
        return stream.watch.received

    def end(self, stream: Stream, cache: Cache | None) -> None:
        """After the last layer: what was dropped, and what the cache holds."""
        requested = self.config.keep
        self.stats = PassStats(requested, torch.stack(stream.kept), stream.seconds)
        if cache is not None:
            last = stream.places[-1]
            known = None if last is None else mark(cache, last)
            self.prompts[cache] = Prompt(len(stream.there), stream.n, stream.places, known)
        self.stream = None

    def __getstate__(self) -> dict[str, Any]:
        # Caches stay where they are: a copy of the model has seen none of them.
        return {**self.__dict__, "prompts": None, "stream": None}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values, prompts=weakref.WeakKeyDictionary())


class PrunedLayer(nn.Module):
    """The wrapper around one layer: `inner` is untouched."""

    def __init__(self, inner: nn.Module, index: int, state: HiddenPruning, config: PreTrainedConfig):
        super().__init__()
        self.inner = inner
        self.index = index
        self.state = state
        self.told = config
        self.signature = inspect.signature(inner.forward)
        # Checkpoints hold the names of the model itself, whether it is pruned when they are written or read.
        self.register_state_dict_post_hook(_as_unpruned)
        self.register_load_state_dict_pre_hook(_as_pruned)
        if hasattr(inner, "attention_type"):
            # Some models read off their layers which mask to hand them.
            self.attention_type = inner.attention_type

    def forward(self, *args, **kwargs):
        named = self._named(args, kwargs)
        hidden, cache = named.pop("hidden_states"), _cache(named)
        if cache is not None and cache.get_seq_length(self.index) > 0:
            return self.inner(hidden, **self._decoding(named, hidden, cache))
        if self.index == 0:
            if self.state.on:
                self._refuse(named, cache)
            if cache is not None:
                self.state.prompts.pop(cache, None)
            # A keyword overrides what the attention says of itself, as in transformers' own attention functions.
            told = named.get("is_causal")
            causal = self.state.causal if told is None else bool(told)
            self.state.begin(hidden, named.get("attention_mask"), causal)
        stream = self.state.stream
        if stream is None:
            return self.inner(*args, **kwargs)
        _refuse_unknown(named, hidden.shape[0], stream.n)
        hidden = self._shortened(hidden, stream)
        if stream.shortened:
            named = self._of_survivors(named, stream)
        if self.state.config.score == "attention" and self.state.config.drops_before(self.index + 1):
            stream.watch = named["watch"] = Watch(stream.alive, stream.causal, self.state.config.last)
        output = self.inner(hidden, **named)
        if self.index + 1 < self.state.config.layers:
            return output
        self.state.end(stream, cache)
        return (stream.restored(output[0]), *output[1:]) if isinstance(output, tuple) else stream.restored(output)

    def _shortened(self, hidden: Tensor, stream: Stream) -> Tensor:
        """The tokens that enter this layer; the stream knows which."""
        if self.state.config.drops_before(self.index):
            began = time.perf_counter()
            stays = self.state.stays(self.index, hidden, stream)
            stream.seconds += time.perf_counter() - began + (stream.watch.seconds if stream.watch else 0.0)
            hidden = stream.shorten(hidden, stays)
            stream.watch = None
        stream.kept.append(stream.stays)
        stream.places.append((stream.column, stream.alive) if stream.shortened else None)
        return hidden

    def _named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by their names: layers get some of them by position."""
        bound = self.signature.bind(*args, **kwargs)
        rest = next((p.name for p in self.signature.parameters.values() if p.kind == p.VAR_KEYWORD), "")
        named = dict(bound.arguments)
        return {**named, **named.pop(rest, {})}

    def _refuse(self, named: dict[str, Any], cache: Cache | None) -> None:
        """UserError for a pass that cannot be shortened."""
        if self.told._attn_implementation != hidden_stream.NAME:
            raise UserError(
                f"attention became {self.told._attn_implementation!r} after prune_hidden: load the model again"
            )
        if getattr(cache, "offloading", False):
            raise UserError("an offloaded cache holds keys elsewhere: pass a plain DynamicCache or use_cache=False")
        if cache is not None and not isinstance(cache, DynamicCache):
            raise UserError(
                f"a {type(cache).__name__} holds as many keys in every layer: pass a DynamicCache or use_cache=False"
            )

    def _of_survivors(self, named: dict[str, Any], stream: Stream) -> dict[str, Any]:
        """What the model says about all columns, of those in the stream."""
        named = {**named, "attention_mask": stream.shown(named.get("attention_mask"))}
        if named.get("position_ids") is not None:
            every = named["position_ids"].expand(len(stream.column), -1)
            named["position_ids"] = every.gather(1, stream.column)
        if named.get("position_embeddings") is not None:
            named["position_embeddings"] = tuple(
                taken(part.expand(len(stream.column), -1, -1), stream.column) for part in named["position_embeddings"]
            )
        return named

    def _decoding(self, named: dict[str, Any], hidden: Tensor, cache: Cache) -> dict[str, Any]:
        """The arguments for tokens after the prompt, with a mask of the keys that this layer's cache holds."""
        fed, held = hidden.shape[1], cache.get_seq_length(self.index)
        # The first layer holds everything, and the new tokens too once it has run.
        before = cache.get_seq_length(0) - (fed if self.index else 0)
        prompt = self.state.prompts.get(cache)
        if prompt is None:
            if held != before:
                raise UserError(
                    "this cache was filled by hidden-state pruning and then copied: decode over the original"
                )
            return named
        place, new = prompt.places[self.index], before - prompt.columns
        width = prompt.columns if place is None else place[0].shape[1]
        if new < 0 or held != width + new or prompt.batch != len(hidden):
            raise UserError("this cache was cut or its batch changed after hidden-state pruning: fill it again")
        if prompt.shortened and getattr(cache.layers[self.index], "is_sliding", False):
            raise UserError("a sliding window counts the keys of a cache, not positions: decode without hidden pruning")
        if self.index == 0 and prompt.moved(cache):
            raise UserError("the rows of this cache changed places after hidden-state pruning: fill it again")
        if place is None:
            return named
        column, alive = place
        written = torch.arange(prompt.columns, before + fed, device=column.device).expand(len(column), -1)
        column, alive = torch.cat([column, written], 1), torch.cat([alive, torch.ones_like(written).bool()], 1)
        return {**named, "attention_mask": over(named.get("attention_mask"), column, alive, fed)}


def _refuse_unknown(named: dict[str, Any], batch: int, n: int) -> None:
    """UserError for what a layer is told of n columns in a form that says not what is whose."""
    for name, value in named.items():
        if name in ("attention_mask", "position_ids", "watch"):
            continue
        parts = value if isinstance(value, tuple | list) else [value]
        told = [part for part in parts if isinstance(part, Tensor) and part.ndim > 0]
        if name == "position_embeddings" and isinstance(value, tuple | list):
            told = [part for part in told if part.ndim != 3 or part.shape[0] not in (1, batch) or part.shape[1] != n]
        if told:
            raise UserError(
                f"layers are told {name} {tuple(told[0].shape)}, and whose that is when tokens leave is unknown: "
                "leave it out, or take a model of another family"
            )


def _cache(named: dict[str, Any]) -> Cache | None:
    return next((named[name] for name in CACHES if named.get(name) is not None), None)


def _as_unpruned(module: nn.Module, tensors: dict, prefix: str, metadata: dict) -> None:
    for name in [name for name in tensors if name.startswith(f"{prefix}inner.")]:
        tensors[prefix + name.removeprefix(f"{prefix}inner.")] = tensors.pop(name)


def _as_pruned(module: nn.Module, tensors: dict, prefix: str, *rest) -> None:
    for name in [name for name in tensors if name.startswith(prefix)]:
        tensors[f"{prefix}inner." + name.removeprefix(prefix)] = tensors.pop(name)
