"""Who writes on these weights? Our engine pruned and dense, transformers with both of its caches, kvpress."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from pipelines.config import GenerationConfig
from pipelines.generation_benchmark.method import Peer
from pipelines.generation_benchmark.ours import Ours
from pipelines.generation_benchmark.subject import Subject, tokens_fed, weight_bytes
from pipelines.generation_benchmark.theirs import Kvpress, Transformers, no_kvpress

DENSE = "ctxprune dense"
DYNAMIC = "transformers dynamic"
STATIC = "transformers static"


def peers(subject: Subject, settings: GenerationConfig) -> list[Peer]:
    """Every peer, those that cannot run here with the reason; ours first."""
    found = []
    for drop, model in subject.pruned.items():
        name = "ctxprune pruned" if drop is None else f"ctxprune pruned {percent(drop)}"
        make = partial(_ours, model, "hard", settings.prefill_chunk)
        found.append(Peer(name, "ctxprune", make, weight_bytes(model, True), drop, pruned=True))
    any_of_them = next(iter(subject.pruned.values()))
    weights = weight_bytes(any_of_them, False)
    found.append(Peer(DENSE, "ctxprune", partial(_ours, any_of_them, "dense", settings.prefill_chunk), weights))
    found.append(Peer(DYNAMIC, "transformers", partial(Transformers, subject.twin), weights))
    # A static cache is compiled on some devices by itself; the dynamic one never is.
    facts = {"compiled": False}
    found.append(Peer(STATIC, "transformers", partial(_static, subject, settings), weights, facts=facts))
    absent = no_kvpress(subject.twin)
    for drop in settings.drops:
        make = partial(_pressed, subject, drop)
        found.append(Peer(f"kvpress knorm {percent(drop)}", "kvpress", make, weights, drop, pruned=True, absent=absent))
    return found


def percent(share: float) -> str:
    """0.85 as 85%."""
    return f"{100 * share:g}%"


def _ours(model, decides, chunk: int, prompts: Tensor) -> Ours:
    return Ours(model, decides, prompts, chunk)


def _static(subject: Subject, settings: GenerationConfig, prompts: Tensor) -> Transformers:
    return Transformers(subject.twin, prompts, tokens_fed(settings, prompts.shape[1]))


def _pressed(subject: Subject, drop: float, prompts: Tensor) -> Kvpress:
    return Kvpress(subject.twin, prompts, drop)
