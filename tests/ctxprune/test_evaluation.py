"""Does an evaluation score the deployed step function, and count pairs and tokens as a person would?"""

from __future__ import annotations

import math

import pytest
import torch

import ctxprune
from ctxprune.evaluation import BUCKET, evaluate
from ctxprune.retrofitting import set_alpha, state_of
from ctxprune.text.batches import Batch
from tests.models import LAYERS, gated, small_model, tokens

N = 20
POSITION = torch.stack([torch.cat([torch.arange(8), torch.arange(12)]), torch.arange(N)])
BATCHES = [Batch(tokens(2, N), POSITION), Batch(tokens(1, N, 5), POSITION[:1])]


def predictions(batch: Batch) -> list[tuple[int, int]]:
    """(row, column) of each token whose successor is in the same document."""
    rows, n = batch.input_ids.shape
    return [(b, t) for b in range(rows) for t in range(n - 1) if batch.position_ids[b, t + 1] != 0]


@torch.no_grad()
def by_hand(model, mode: str, context: int | None = None) -> float:
    """Perplexity over the predicted tokens (with that much context)."""
    nats = []
    for batch in BATCHES:
        with ctxprune.mode(model, mode):
            logits = model(batch.input_ids, position_ids=batch.position_ids).logits.double()
        for b, t in predictions(batch):
            seen = int(batch.position_ids[b, t]) + 1
            if context is None or BUCKET * context < seen <= context:
                nats.append(-torch.log_softmax(logits[b, t], -1)[batch.input_ids[b, t + 1]].item())
    return math.exp(sum(nats) / len(nats))


def test_perplexity_is_that_of_the_step_function_and_the_soft_one_stands_beside_it():
    model = gated()
    set_alpha(model, 1.5)
    result = evaluate(model, BATCHES, [])
    assert result.perplexity == pytest.approx(by_hand(model, "hard"), rel=1e-5)
    assert result.perplexity_soft == pytest.approx(by_hand(model, "soft"), rel=1e-5)
    assert abs(result.perplexity / result.perplexity_soft - 1) > 1e-3
    assert result.tokens == sum(len(predictions(batch)) for batch in BATCHES) == 18 * 2 + 19


def test_perplexity_at_a_context_takes_the_tokens_with_that_much_context():
    model = gated()
    result = evaluate(model, BATCHES, [8, 16, 64])
    assert result.perplexity_at["8"] == pytest.approx(by_hand(model, "hard", 8), rel=1e-5)
    assert result.perplexity_at["16"] == pytest.approx(by_hand(model, "hard", 16), rel=1e-5)
    assert result.perplexity_at["64"] is None and result.sparsity_at["64"] is None


def test_sparsity_counts_every_pair_of_a_document_once():
    model = gated()
    kept, pairs = [0] * LAYERS, 0
    at = {8: [0, 0], 16: [0, 0]}
    for batch in BATCHES:
        times = ctxprune.drop_times(model, batch.input_ids, position_ids=batch.position_ids).drop_time
        for b in range(len(batch.input_ids)):
            for query in range(N):
                past = int(batch.position_ids[b, query])
                pairs += past
                seen = [sum(int(times[layer, b, j]) > query for j in range(query - past, query)) for layer in range(3)]
                kept = [a + c for a, c in zip(kept, seen, strict=True)]
                for context, count in at.items():
                    if BUCKET * context < past + 1 <= context:
                        count[0] += sum(seen)
                        count[1] += past * LAYERS
    result = evaluate(model, BATCHES, [8, 16])
    assert result.sparsity_per_layer == pytest.approx([1 - k / pairs for k in kept])
    assert result.sparsity == pytest.approx(1 - sum(kept) / pairs / LAYERS)
    assert result.sparsity_at == {str(c): pytest.approx(1 - k / p) for c, (k, p) in at.items()}


@pytest.mark.parametrize("config", [ctxprune.WindowConfig((5,) * LAYERS), ctxprune.DenseConfig()])
def test_without_gates_there_is_no_soft_perplexity(config):
    result = evaluate(ctxprune.retrofit(small_model(), config), BATCHES, [])
    assert result.perplexity_soft is None
    assert (result.sparsity > 0) == (config.policy == "window")


def test_a_dense_model_scores_like_the_original():
    result = evaluate(ctxprune.retrofit(small_model(), ctxprune.DenseConfig()), [BATCHES[0]], [])
    nats, count = 0.0, 0
    with torch.no_grad():
        for b, t0, t1 in ((0, 0, 8), (0, 8, N), (1, 0, N)):
            document = BATCHES[0].input_ids[b : b + 1, t0:t1]
            logits = torch.log_softmax(small_model()(document).logits[0, :-1].double(), -1)
            nats -= logits.gather(1, document[0, 1:, None]).sum().item()
            count += t1 - t0 - 1
    assert result.perplexity == pytest.approx(math.exp(nats / count), rel=1e-5)


def test_it_leaves_eval_mode_and_tells_how_far_it_is():
    model, told = gated().train(), []
    evaluate(model, BATCHES, [8], told.append)
    assert told == [1, 2] and not model.training and state_of(model).mode == "auto"
    assert not state_of(model).survival
