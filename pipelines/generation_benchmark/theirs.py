"""How do others write on the same weights? transformers' own `generate`, and kvpress where it is installed."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pipelines.generation_benchmark.method import now


class Transformers:
    """`model.generate`, its own overhead included, as a person would see it.

    A call goes on where the last one ended, in the cache that it left, so that methods can take turns. What a call does
    once, before its first token, would have been done once in all: the first interval of each later call is left out.
    """

    def __init__(self, model: PreTrainedModel, prompts: Int[Tensor, "batch n"], room: int | None = None):
        """room: tokens that a static cache has room for; None: a dynamic cache, which is copied at every step."""
        self.model, self.prompts, self.room = model, prompts, room
        self.cache: Cache = DynamicCache()
        self.ids = prompts

    def read(self) -> float:
        """See Method."""
        config = self.model.config
        self.ids = self.prompts
        # As generate would make them; it also takes them as they are.
        self.cache = (
            DynamicCache(config=config) if self.room is None else StaticCache(config=config, max_cache_len=self.room)
        )
        return self._generate(1)[0]

    def steps(self, count: int) -> list[float]:
        """See Method."""
        return self._generate(count)[1:]

    def _generate(self, count: int) -> list[float]:
        """Seconds of each of the next tokens."""
        clock = _Clock(self.ids.device)
        config = GenerationConfig(
            max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, disable_compile=True
        )
        self.ids = self.model.generate(
            self.ids, attention_mask=torch.ones_like(self.ids), generation_config=config,
            past_key_values=self.cache, stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        return [end - start for start, end in pairwise(clock.stamps)]

    def text(self) -> Int[Tensor, "batch n"]:
        """See Method."""
        return self.ids

    def cache_bytes(self) -> tuple[int, int]:
        """See Method."""
        held = held_bytes(self.cache)
        return (held if self.room is None else held * int(self.cache.get_seq_length()) // self.room), held

    def live_share(self) -> float:
        """See Method."""
        return 1.0


class _Clock(StoppingCriteria):
    """Stops nothing and notes when it is asked: once per token."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stamps = [now(device)]

    def __call__(self, input_ids: Tensor, scores, **keywords) -> Tensor:
        self.stamps.append(now(self.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Kvpress:
    """A prompt's keys of the largest norms leave a dynamic cache when it has been read; what is written all stays."""

    def __init__(self, model: PreTrainedModel, prompts: Int[Tensor, "batch n"], drop: float):
        self.model, self.prompts, self.drop = model, prompts, drop
        self.cache = DynamicCache()
        self.written: list[Tensor] = []

    def read(self) -> float:
        """See Method."""
        from kvpress import KnormPress

        device = self.prompts.device
        start = now(device)
        self.cache = DynamicCache(config=self.model.config)
        with torch.inference_mode(), KnormPress(self.drop)(self.model):
            # Its hooks look for the columns of a pass, which newer versions of transformers tell layers no more.
            columns = torch.arange(self.prompts.shape[1], device=device)
            output = self.model(
                self.prompts, past_key_values=self.cache, use_cache=True, logits_to_keep=1, cache_position=columns
            )
        self.written = [output.logits[:, -1].argmax(-1)]
        return now(device) - start

    @torch.inference_mode()
    def steps(self, count: int) -> list[float]:
        """See Method."""
        device, times = self.prompts.device, []
        for _ in range(count):
            start = now(device)
            # The cache knows how many keys it holds, not how many tokens there were.
            place = torch.full_like(self.prompts[:, :1], self.prompts.shape[1] + len(self.written) - 1)
            last = self.written[-1][:, None]
            output = self.model(last, position_ids=place, past_key_values=self.cache, use_cache=True)
            self.written.append(output.logits[:, -1].argmax(-1))
            times.append(now(device) - start)
        return times

    def text(self) -> Int[Tensor, "batch n"]:
        """See Method."""
        return torch.cat([self.prompts, torch.stack(self.written, 1)], 1)

    def cache_bytes(self) -> tuple[int, int]:
        """See Method."""
        return (held_bytes(self.cache),) * 2

    def live_share(self) -> float:
        """See Method."""
        held = [layer.keys.shape[2] for layer in self.cache.layers]
        return sum(held) / len(held) / (self.prompts.shape[1] + len(self.written) - 1)


def held_bytes(cache: Cache) -> int:
    """Of all keys and values."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def no_kvpress(model: PreTrainedModel) -> str | None:
    """Why kvpress cannot run here; None where it can."""
    if importlib.util.find_spec("kvpress") is None:
        return "the package kvpress is not installed"
    try:
        from kvpress import SUPPORTED_MODELS
    except Exception as error:  # made for certain versions of transformers, it fails beside others in ways of its own
        return f"the package kvpress cannot be imported here: {type(error).__name__}: {str(error)[:120]}"
    if not isinstance(model, SUPPORTED_MODELS):
        return f"kvpress does not support models of the family {model.config.model_type}"
    return None
