"""How much work is a pass? Its multiplications by layer, and the shorter text that takes as much.

A multiplication and an addition are two operations. Embeddings, norms, softmax and the classifier, which every method
has in common or which are small, are left out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import torch

from ctxprune.hidden_pruning import HiddenPruningConfig

EXPANSION = 4
"""Hidden size of a feed-forward layer over the model's, as in BERT."""


def kept_tokens(config: HiddenPruningConfig, tokens: int) -> tuple[int, ...]:
    """Tokens of a row without padding that enter each layer, the opening one (protected) included."""
    length, layers = torch.tensor([tokens]), config.layers
    return tuple(int(config.budget(layer).count(length, layer, layers)) for layer in range(layers))


def pass_flops(tokens: Sequence[int], width: int, asked: int | None = None) -> int:
    """Operations of one row whose layers are entered by so many tokens each.

    Per layer of n tokens: 8 n width^2 (query, key, value, output), 4 n width^2 EXPANSION (feed-forward) and 4 n^2 width
    (scores and their sums). asked: query rows that are scored a second time before each drop (0: all), 2 asked n width.
    """
    whole = sum(n * width * (8 * width + 4 * EXPANSION * width + 4 * n) for n in tokens)
    if asked is None:
        return whole
    drops = [before for before, after in pairwise(tokens) if after < before]
    return whole + sum(2 * min(asked or n, n) * n * width for n in drops)


def truncated_tokens(flops: int, layers: int, width: int, tokens: int) -> int:
    """The fewest first tokens, at most `tokens`, of which a dense pass does at least so many operations: a control that
    cuts its input never has less to work with than what it is held against."""
    return 1 + bisect_left(range(1, tokens), flops, key=lambda n: pass_flops([n] * layers, width))
