"""How does transformers' own `model.generate` forget? A retrofitted model hands it a PrunedCache where it would make a
cache of its own.

The model's class becomes a subclass of the same name, since generate asks the class and not a setting.
"""

from __future__ import annotations

import warnings

from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationConfig

from ctxprune.cache.pruned_cache import PrunedCache
from ctxprune.calls import PruningState
from ctxprune.errors import UserError


class Forgetting:
    """What a retrofitted model's class has before its own."""

    pruning_state: PruningState

    def __call__(self, *args, **kwargs):
        """Layers meet hidden states alone; some policies ask which tokens these are, and some models (GPTBigCode) do
        not tell their layers where."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.pruning_state.ids = ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None
        self.pruning_state.positions = kwargs.get("position_ids")
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol):
        """For pickle and copy, which would look for this class under the name of the model's own."""
        bases = type(self).__mro__
        return _blank, (bases[bases.index(Forgetting) + 1],), self.__getstate__()

    def save_pretrained(self, *args, **kwargs) -> None:
        """As transformers' own; Trainer resumes from it. `from_pretrained` does not read it: it knows no gates."""
        said = "from_pretrained cannot read a retrofitted model (its attention would start anew): use ctxprune.save"
        warnings.warn(said, stacklevel=2)
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *others, **more
    ) -> None:
        """Called by transformers' generate: puts the cache into model_kwargs."""
        asked = generation_config.cache_implementation
        if asked not in (None, "dynamic"):
            raise UserError(f"cache_implementation={asked!r} cannot forget: leave it out")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            cache = PrunedCache()
            if generation_config.is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache


def _blank(original: type[PreTrainedModel]) -> PreTrainedModel:
    """An object of the class of a retrofitted model of this class, still without anything."""
    made = _forgetting(original)
    return made.__new__(made)


def _forgetting(original: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(original.__name__, (Forgetting, original), {"__module__": original.__module__})


def forgets(model: PreTrainedModel, state: PruningState) -> None:
    """Make `model.generate` use a PrunedCache, and tell the layers, which share `state`, what is read."""
    model.pruning_state = state  # type: ignore[assignment]
    model.__class__ = _forgetting(type(model))
