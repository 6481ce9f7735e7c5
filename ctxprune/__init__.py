"""ctxprune: a pretrained language model learns what it may forget."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctxprune.cache.pruned_cache import PrunedCache
    from ctxprune.cache.revival import Alarm
    from ctxprune.checkpoint import load, save
    from ctxprune.drop_time import DropTimes, drop_times
    from ctxprune.errors import UserError
    from ctxprune.generation.batching import Batcher
    from ctxprune.generation.cascade import Cascade
    from ctxprune.generation.generate import Generation, generate
    from ctxprune.generation.lossless import LosslessGeneration, generate_lossless
    from ctxprune.packing import pack
    from ctxprune.policies import DenseConfig, GateConfig, StridedConfig, WindowConfig
    from ctxprune.retrofitting import mode, retrofit, set_alpha
    from ctxprune.schedule import PruningSchedule

# Looked up on first use: a mistake on the command line is answered before torch and transformers are loaded.
_HOME = {
    "Alarm": "cache.revival",
    "Batcher": "generation.batching",
    "Cascade": "generation.cascade",
    "DenseConfig": "policies",
    "DropTimes": "drop_time",
    "GateConfig": "policies",
    "Generation": "generation.generate",
    "LosslessGeneration": "generation.lossless",
    "PrunedCache": "cache.pruned_cache",
    "PruningSchedule": "schedule",
    "StridedConfig": "policies",
    "UserError": "errors",
    "WindowConfig": "policies",
    "drop_times": "drop_time",
    "generate": "generation.generate",
    "generate_lossless": "generation.lossless",
    "load": "checkpoint",
    "mode": "retrofitting",
    "pack": "packing",
    "retrofit": "retrofitting",
    "save": "checkpoint",
    "set_alpha": "retrofitting",
}
__all__ = [
    "Alarm",
    "Batcher",
    "Cascade",
    "DenseConfig",
    "DropTimes",
    "GateConfig",
    "Generation",
    "LosslessGeneration",
    "PrunedCache",
    "PruningSchedule",
    "StridedConfig",
    "UserError",
    "WindowConfig",
    "drop_times",
    "generate",
    "generate_lossless",
    "load",
    "mode",
    "pack",
    "retrofit",
    "save",
    "set_alpha",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'ctxprune' has no attribute {name!r}")
    return getattr(import_module(f"ctxprune.{_HOME[name]}"), name)
