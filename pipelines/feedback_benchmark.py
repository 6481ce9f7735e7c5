"""What do the feedback loops buy on a saved model? The alarm by how often the pruned model says what its dense self
says, the lossless mode by its acceptance and its speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune.cache.pruned_cache import PrunedCache
from ctxprune.cache.revival import Alarm
from ctxprune.generation.generate import generate
from ctxprune.generation.lossless import generate_lossless
from ctxprune.retrofitting import mode

SHARES = (0.999, 0.99, 0.9, 0.5)
"""What the alarms allow dropped keys to have of a query's attention."""


LOOPS = ("alarm", "lossless")


def records(
    model,
    ids: Int[Tensor, "batch n"],
    prompt: int,
    repeats: int,
    loops: Sequence[str] = LOOPS,
    draft: int = 0,
    temperature: float = 0.0,
) -> Iterator[dict[str, object]]:
    """One record per way to decode. alarm: ids are read up to `prompt`, then fed token by token, without an alarm and
    with several; lossless: the mode continues the prompts, with `draft` drafts a round (0: as many as pay),
    greedily or at a temperature."""
    if "alarm" in loops:
        yield from alarms(model, ids, prompt)
    if "lossless" in loops:
        yield lossless(model, ids[:, :prompt], ids.shape[1] - prompt, repeats, draft, temperature)


def alarms(model, ids: Int[Tensor, "batch n"], prompt: int) -> Iterator[dict[str, object]]:
    """Without an alarm, then with one by what it allows."""
    with torch.inference_mode(), mode(model, "dense"):
        dense = model(ids, use_cache=False).logits[:, prompt - 1 : -1].double()
    yield agreement(model, ids, prompt, dense, None)
    for share in SHARES:
        yield agreement(model, ids, prompt, dense, Alarm(share=share))


def agreement(model, ids: Tensor, prompt: int, dense: Tensor, alarm: Alarm | None) -> dict[str, object]:
    """How often the likeliest next token is the dense model's, and the mean divergence KL(dense, pruned) in nats."""
    cache, logits, live = PrunedCache(alarm=alarm), [], []
    with torch.inference_mode(), mode(model, "hard"):
        logits.append(model(ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1).logits)
        start = time.perf_counter()
        for step in range(prompt, ids.shape[1] - 1):
            logits.append(model(ids[:, step : step + 1], past_key_values=cache, use_cache=True).logits)
            if alarm is None and step % 32 == 0:
                cache.shrink()
            live.append(float(cache.live_tokens().double().mean()))
        seconds = time.perf_counter() - start
    found = torch.cat(logits, 1).double()
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True
    )
    record: dict[str, object] = {
        "kind": "feedback",
        "method": "pruned" if alarm is None else f"alarm, share {alarm.share:g}",
        "agreement": float((found.argmax(-1) == dense.argmax(-1)).double().mean()),
        "divergence": float(divergence.sum(-1).mean()),
        "live_tokens": statistics.mean(live),
        "ms_per_step": 1e3 * seconds / len(live),
    }
    if alarm is not None:
        record |= {"alarms": alarm.alarms / alarm.checks, "revived_per_step": alarm.revived / alarm.checks}
    return record


def lossless(
    model, prompts: Int[Tensor, "batch n"], new_tokens: int, repeats: int, draft: int = 0, temperature: float = 0.0
) -> dict[str, object]:
    """Text of the lossless mode and of the dense model, in turn. Writing is timed from the first tokens to the last;
    the lossless mode reads its prompts twice, which stands apart. Greedy texts are compared; sampled ones are equal in
    distribution alone, and nothing is said of how many tokens differ."""
    write, whole = [], []
    settings = {"max_new_tokens": new_tokens, "temperature": temperature}
    for _ in range(repeats):
        made, *mine = _timed(generate_lossless, model, prompts, draft=draft or None, **settings)
        with mode(model, "dense"):
            dense, *its = _timed(generate, model, prompts, max_batch=len(prompts), **settings)
        write.append(its[1] / mine[1])
        whole.append(sum(its) / sum(mine))
    pairs = list(zip(made.tokens, dense.tokens, strict=True))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "kind": "feedback",
        "method": "lossless",
        "rows": len(prompts),
        "prompt_tokens": prompts.shape[1],
        "new_tokens": new_tokens,
        "threads": torch.get_num_threads(),
        "weight_bytes": weights,
        "cache_bytes": made.cache_bytes,
        "cache_over_weights": made.cache_bytes / weights,
        "draft_cache_share": made.draft_cache_bytes / made.cache_bytes,
        "temperature": temperature,
        "differing_tokens": None if temperature else sum(int((one != other).sum()) for one, other in pairs),
        "differing_rows": None if temperature else sum(not torch.equal(*pair) for pair in pairs),
        "tokens": sum(len(row) for row in dense.tokens),
        "acceptance": made.acceptance,
        "drafts_per_pass": made.steps / max(1, made.passes),
        "expected_speedup": made.expected_speedup,
        "speedup": statistics.median(write),
        "speedup_spread": [min(write), max(write)],
        "speedup_with_prompts": statistics.median(whole),
        "repeats": repeats,
        "dense_ms_per_step": 1e3 * its[1] / max(1, new_tokens - 1),
    }


def _timed(write: Callable, model, prompts: Tensor, **settings):
    """What was written, seconds to the first token, seconds from it to the last."""
    first: list[float] = []

    def heard(row: int, token: int) -> None:
        if not first:
            first.append(time.perf_counter())

    start = time.perf_counter()
    made = write(model, prompts, on_token=heard, **settings)
    return made, first[0] - start, time.perf_counter() - first[0]


def _regime(record: dict) -> str:
    """What the speed was measured on, where the record says it."""
    if "rows" not in record:
        return ""
    low, high = record["speedup_spread"]
    return (
        f", {low:.2f} to {high:.2f} in {record['repeats']} repeats, {record['speedup_with_prompts']:.2f}x with prompts"
        f"; {record['rows']} rows, {record['prompt_tokens']} + {record['new_tokens']} tokens, cache "
        f"{record['cache_over_weights']:.1f} times the weights, {record['draft_cache_share']:.0%} of it for drafts"
    )


def line(record: dict) -> str:
    """One line for people."""
    if record["method"] == "lossless":
        text = f"{record['tokens']} tokens sampled at temperature {record.get('temperature')}"
        if record["differing_tokens"] is not None:
            text = f"{record['differing_tokens']} of {record['tokens']} greedy tokens are not the dense model's"
        return (
            f"lossless: {text}; {record['acceptance']:.1%} of the drafts accepted, "
            f"{record['drafts_per_pass']:.1f} per pass; {record['speedup']:.2f}x dense speed "
            f"({record['expected_speedup']:.2f}x by the bytes moved){_regime(record)}"
        )
    text = (
        f"{record['method']:18} says what the dense model says {record['agreement']:7.2%}  "
        f"divergence {record['divergence']:.4f} nats  {record['live_tokens']:7.1f} keys alive per layer  "
        f"{record['ms_per_step']:7.2f} ms per step"
    )
    if "alarms" in record:
        text += f"  {record['alarms']:6.2%} of queries alarmed  {record['revived_per_step']:.2f} keys back per query"
    return text
