"""What do the feedback loops buy on a saved model? The alarm by how often the pruned model says what its dense self
says, the lossless mode by its acceptance and its speed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune.cache import PrunedCache
from ctxprune.generation import generate
from ctxprune.lossless import generate_lossless
from ctxprune.retrofitting import mode
from ctxprune.revival import Alarm

SHARES = (0.999, 0.99, 0.9, 0.5)
"""What the alarms allow dropped keys to have of a query's attention."""


def records(model, ids: Int[Tensor, "batch n"], prompt: int, repeats: int) -> Iterator[dict[str, object]]:
    """One record per way to decode: ids are read up to `prompt`, then fed token by token. The last is the lossless
    mode's, which continues the prompts."""
    with torch.inference_mode(), mode(model, "dense"):
        dense = model(ids, use_cache=False).logits[:, prompt - 1 : -1].double()
    yield agreement(model, ids, prompt, dense, None)
    for share in SHARES:
        yield agreement(model, ids, prompt, dense, Alarm(share=share))
    yield lossless(model, ids[:, :prompt], ids.shape[1] - prompt, repeats)


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


def lossless(model, prompts: Int[Tensor, "batch n"], new_tokens: int, repeats: int) -> dict[str, object]:
    """Greedy text of the lossless mode and of the dense model, in turn."""
    times: dict[str, list[float]] = {"lossless": [], "dense": []}
    for _ in range(repeats):
        made, seconds = _timed(lambda: generate_lossless(model, prompts, max_new_tokens=new_tokens))
        times["lossless"].append(seconds)
        with mode(model, "dense"):
            dense, seconds = _timed(lambda: generate(model, prompts, max_new_tokens=new_tokens))
        times["dense"].append(seconds)
    pairs = zip(made.tokens, dense.tokens, strict=True)
    return {
        "kind": "feedback",
        "method": "lossless",
        "differing_tokens": sum(int((one != other).sum()) for one, other in pairs),
        "tokens": sum(len(row) for row in dense.tokens),
        "acceptance": made.acceptance,
        "drafts_per_pass": made.steps / max(1, made.passes),
        "expected_speedup": made.expected_speedup,
        "speedup": statistics.median(times["dense"]) / statistics.median(times["lossless"]),
    }


def _timed(work: Callable):
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def line(record: dict) -> str:
    """One line for people."""
    if record["method"] == "lossless":
        return (
            f"lossless: {record['differing_tokens']} of {record['tokens']} greedy tokens are not the dense model's; "
            f"{record['acceptance']:.1%} of the drafts accepted, {record['drafts_per_pass']:.1f} per pass; "
            f"{record['speedup']:.2f}x dense speed ({record['expected_speedup']:.2f}x by the bytes moved)"
        )
    text = (
        f"{record['method']:18} says what the dense model says {record['agreement']:7.2%}  "
        f"divergence {record['divergence']:.4f} nats  {record['live_tokens']:7.1f} keys alive per layer  "
        f"{record['ms_per_step']:7.2f} ms per step"
    )
    if "alarms" in record:
        text += f"  {record['alarms']:6.2%} of queries alarmed  {record['revived_per_step']:.2f} keys back per query"
    return text
