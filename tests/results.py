"""What does a trial leave behind? result.json records for the tests of table, page and report, no training needed."""

from __future__ import annotations


def result(trial, model="tiny", policy="learned", target=0.8, perplexity=12.0, **changes):
    """The least a report can live with: who, what was dropped, at which perplexity. Keyword arguments add."""
    return {
        "trial": trial,
        "model": model,
        "policy": policy,
        "sparsity_target": target,
        "sparsity": target or 0.0,
        "perplexity": perplexity,
    } | changes


def whole(trial, model="tiny", policy="learned", target=0.8, perplexity=12.0, **changes):
    """A complete result.json; keyword arguments replace fields."""
    return (
        result(trial, model, policy, target, perplexity)
        | {
            "sparsity_per_layer": [target or 0.0] * 2,
            "perplexity_soft": perplexity * 0.99 if policy == "learned" else None,
            "perplexity_at": {"64": perplexity + 1, "128": perplexity},
            "sparsity_at": {"64": target, "128": target},
            "tokens_per_second": 200.0,
            "tokens_per_second_dense": 100.0,
            "tokens_per_second_spread": [190.0, 205.0],
            "ms_per_token": 5.0,
            "ms_per_token_dense": 10.0,
            "cache_bytes": 1000,
            "cache_bytes_dense": 4000,
            "train_tokens": 4096,
            "seed": 0,
            "machine": {"cpu": "a cpu", "cores": 2, "memory_gb": 8, "gpu": None, "system": "Linux"},
            "versions": {"torch": "2.13.0"},
            "benchmark": {"batch": 32, "prompt": 128, "new_tokens": 64, "repeats": 3},
        }
        | changes
    )
