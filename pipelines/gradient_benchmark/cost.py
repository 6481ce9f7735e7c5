"""What do gradients cost at prefill? A plain pass over the prompt, and the same pass with edge gradients, in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ctxprune.errors import UserError
from ctxprune.replay import Context
from ctxprune.teachers.edge_gradient import edge_gradients
from pipelines.generation_benchmark.subject import twin_of
from pipelines.kernel_benchmark.clock import seconds

PASSES = 3
"""What the last rows are worth in passes: run once more, and differentiated at twice that."""


def records(model, ids: Int[Tensor, "batch n"], queries: Sequence[int], repeats: int) -> Iterator[dict[str, object]]:
    """A record per number of last query rows whose predictions are differentiated.

    The plain pass is transformers' own, which fills its cache; the gradients take keys and values from that cache and
    run the last rows once more, so that they are predicted to cost 3 w / T of the pass. ratio: both over the plain
    pass of the same round, median; before the first round everything has run once.
    """
    twin, wanted = twin_of(model).requires_grad_(False), sorted(set(queries))
    runs: dict[int, Callable[[], object]] = {0: lambda: prefill(twin, ids)}
    for width in wanted:
        runs[width] = lambda width=width: with_gradients(twin, model, ids, width)
    rounds = []
    for turn in range(repeats + 1):
        times = {width: seconds(run, ids.device) for width, run in runs.items()}
        rounds += [times] if turn else []
    for width in wanted:
        ratios = [times[width] / times[0] for times in rounds]
        yield {
            "kind": "gradients",
            "part": "cost",
            "length": ids.shape[1],
            "queries": width,
            "rows": len(ids),
            "dtype": str(twin.dtype).removeprefix("torch."),
            "forward_ms": 1e3 * statistics.median(times[0] for times in rounds),
            "with_gradients_ms": 1e3 * statistics.median(times[width] for times in rounds),
            "ratio": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "predicted_ratio": 1 + PASSES * width / ids.shape[1],
            "repeats": repeats,
        }


@torch.no_grad()  # not inference mode: what is read there cannot be differentiated
def prefill(twin: PreTrainedModel, ids: Int[Tensor, "batch n"]):
    """transformers' cache of the whole prompt."""
    return twin(ids, use_cache=True, logits_to_keep=1).past_key_values


def with_gradients(
    twin: PreTrainedModel, model, ids: Int[Tensor, "batch n"], width: int
) -> Float[Tensor, "layers batch context"]:
    """The same pass, then the worth of the keys before the last `width` tokens. UserError for a model whose cache is
    shorter than the prompt."""
    layers, context = prefill(twin, ids).layers, ids.shape[1] - width
    if any(layer.keys.shape[2] != ids.shape[1] for layer in layers):
        raise UserError(
            f"the model attends in a window shorter than gradients.lengths={ids.shape[1]}: give lengths within it"
        )
    keys = [layer.keys[:, :, :context] for layer in layers]
    values = [layer.values[:, :, :context] for layer in layers]
    return edge_gradients(model, Context(ids[:, :context], keys=keys, values=values), ids[:, context:])
