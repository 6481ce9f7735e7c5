"""What is compared? Dense, hidden-state pruning, and its controls, on equal rows, steps or FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from ctxprune.hidden_pruning import HiddenPruningConfig
from pipelines.benchmark_config import HiddenConfig
from pipelines.hidden_benchmark.flops import kept_tokens, pass_flops, truncated_tokens

DENSE = "dense"
PRUNED = "pruned"


@dataclass(frozen=True)
class Method:
    """One way to classify a row."""

    name: str
    tokens: int
    """First tokens of a row that are read."""
    kept: tuple[int, ...]
    """Of these, how many enter each layer."""
    flops: int
    """Operations per row, deciding included."""
    pruning: HiddenPruningConfig | None = None
    """None: all tokens go through all layers."""
    trained: bool = True
    """Whether fine-tuned as it runs; otherwise with dense's weights."""


def methods(settings: HiddenConfig) -> list[Method]:
    """All of them, dense first: it is what the others are held against."""
    found = [_dense(DENSE, settings, settings.tokens), _pruned(PRUNED, settings, "attention")]
    cut = truncated_tokens(found[1].flops, settings.layers, settings.width, settings.tokens)
    found.append(_dense("truncated", settings, cut))
    found += [_pruned(f"{score} score", settings, score) for score in ("random", "norm")]
    found.append(_pruned("not trained under it", settings, "attention", trained=False))
    return found


def _dense(name: str, settings: HiddenConfig, tokens: int) -> Method:
    kept = (tokens,) * settings.layers
    return Method(name, tokens, kept, pass_flops(kept, settings.width))


def _pruned(name: str, settings: HiddenConfig, score: str, trained: bool = True) -> Method:
    # Rows end with text, not with a separator: only the opening token has a right to stay.
    config = HiddenPruningConfig(
        tuple(settings.keep), score=score, last=settings.asked, protect_last=0, seed=settings.seed
    )
    kept = kept_tokens(config, settings.tokens)
    flops = pass_flops(kept, settings.width, settings.asked if score == "attention" else None)
    return Method(name, settings.tokens, kept, flops, config, trained)
