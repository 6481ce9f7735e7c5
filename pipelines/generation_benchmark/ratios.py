"""What do the numbers of several methods say together? How many times as fast, what bytes allow, and from where on."""

from __future__ import annotations

from collections.abc import Iterable

from pipelines.generation_benchmark.peers import DENSE, DYNAMIC, STATIC

OVER = {"dense": DENSE, "dynamic": DYNAMIC, "static": STATIC}
"""Whom we are compared with, by the ending of a field."""


def compared(records: list[dict]) -> list[dict]:
    """The records of one case; ours with their ratios, None where the other was not measured.

    decode_speedup_over_*, prefill_speedup_over_*: how many times as fast we are; decode_mean_speedup_over_*: by mean
    steps, not median ones: what is planned or tidied up once in a while counts, as does noise; cache_share_of_*: our
    live bytes over theirs; allocated_share_of_*: what is held, over what they hold; bytes_allow_over_*: bytes that a
    step must move, theirs over ours (weights and what lives in the cache, interaction keys included). Where steps wait
    for memory alone that is the largest speed-up; over who moves more than a step must, as a dynamic cache, there may
    be more.
    """
    measured = {record["method"]: record for record in records if "absent" not in record}
    return [record | _ratios(record, measured) if _ours(record) else record for record in records]


def _ratios(record: dict, measured: dict[str, dict]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for short, name in OVER.items():
        if name == record["method"]:
            continue
        other = measured.get(name)
        found |= {
            f"decode_speedup_over_{short}": other and other["decode_ms"] / record["decode_ms"],
            f"decode_mean_speedup_over_{short}": other and other["decode_mean_ms"] / record["decode_mean_ms"],
            f"bytes_allow_over_{short}": other and other["step_bytes"] / record["step_bytes"],
            f"prefill_speedup_over_{short}": other and other["prefill_seconds"] / record["prefill_seconds"],
            f"cache_share_of_{short}": other and record["cache_live_bytes"] / other["cache_live_bytes"],
            f"allocated_share_of_{short}": other and record["cache_allocated_bytes"] / other["cache_allocated_bytes"],
        }
    return found


def best(records: Iterable[dict]) -> list[dict]:
    """Each method at the batch at which it writes most tokens per second, by context; ours with how many times as many
    as others'."""
    by_context: dict[int, dict[str, dict]] = {}
    for record in records:
        if "absent" not in record:
            methods = by_context.setdefault(record["context"], {})
            before = methods.get(record["method"])
            if before is None or record["tokens_per_second"] > before["tokens_per_second"]:
                methods[record["method"]] = record
    found = []
    for context, methods in by_context.items():
        for name, record in methods.items():
            one = {"context": context, "method": name, "batch": record["batch"]}
            one["tokens_per_second"] = record["tokens_per_second"]
            if _ours(record):
                for short, other in OVER.items():
                    if other != name:
                        rate = methods[other]["tokens_per_second"] if other in methods else None
                        one[f"speedup_over_{short}"] = rate and record["tokens_per_second"] / rate
            found.append(one)
    return found


def break_even(records: Iterable[dict]) -> list[dict]:
    """By batch and pruned method of ours, the smallest context measured at which a step is at least as fast as dense in
    our engine; None: at none."""
    found: dict[tuple[int, str], int | None] = {}
    for record in sorted((r for r in records if _ours(r) and r["pruned"]), key=lambda r: r["context"]):
        key = (record["batch"], record["method"])
        found.setdefault(key, None)
        speedup = record.get("decode_speedup_over_dense")
        if found[key] is None and speedup is not None and speedup >= 1:
            found[key] = record["context"]
    return [
        {"batch": batch, "method": method, "break_even_context": context} for (batch, method), context in found.items()
    ]


def _ours(record: dict) -> bool:
    return record["engine"] == "ctxprune" and "absent" not in record
