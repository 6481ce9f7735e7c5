"""How does a person read the records? One line each, and after each case what to make of them."""

from __future__ import annotations

NAMES = {
    "dense": "dense in our engine",
    "dynamic": "transformers' dynamic cache",
    "static": "transformers' static cache",
}


def parity(record: dict) -> str:
    """Whether results are right."""
    tokens = "the same tokens as transformers" if record["same_tokens"] else "OTHER TOKENS than transformers"
    pruned = f"pruned steps against one pass: largest error {record['error']:.1e}, allowed {record['allowed']:.1e}"
    if record.get("same_tokens_played") is not None:
        pruned += f"; {record['same_tokens_played']:.0%} of tokens the same from captured steps"
    if record["passed"]:
        return f"parity in float64: dense writes {tokens}; {pruned} ({record['dropped']:.0%} dropped)"
    return f"parity in float64 FAILED: dense writes {tokens}; {pruned}; nothing is timed"


def head(gates: str, model: dict) -> str:
    """What is measured, and titles above the lines."""
    titles = ("context", "batch", "method", "ms a step", "20 % to 80 %", "tokens/s", "prompt s", "cache MB", "held MB")
    return (
        f"{model['family']}, {model['parameters'] / 1e6:.1f} M parameters, {model['layers']} layers; gates: {gates}\n"
        + "{:>7} {:>5}  {:<24} {:>9} {:>17} {:>9} {:>9} {:>9} {:>9}  {}".format(*titles, "keys alive")
    )


def line(record: dict) -> str:
    """One method in one case."""
    start = f"{record['context']:>7} {record['batch']:>5}  {record['method']:<24}"
    if "absent" in record:
        return f"{start} {'-':>9} {'-':>17}  {record['absent']}"
    low, high = record["decode_ms_quantiles"]
    more = f"{record['live_share']:.1%}, {record['live_share_at_end']:.1%} at the end"
    if not record["pruned"]:
        more = "all"
    if "peak_bytes" in record:
        more += f", peak {record['peak_bytes'] / 1e6:.0f} MB"
    return (
        f"{start} {record['decode_ms']:>9.2f} {f'{low:.2f} to {high:.2f}':>17} {record['tokens_per_second']:>9.1f} "
        f"{record['prefill_seconds']:>9.3f} {record['cache_live_bytes'] / 1e6:>9.2f} "
        f"{record['cache_allocated_bytes'] / 1e6:>9.2f}  {more}"
    )


def comparison(records: list[dict]) -> str:
    """How many times as fast our pruned decoding is, what bytes allow, and the same of the prompt and the cache."""
    told = []
    for record in records:
        there = [short for short in NAMES if record.get(f"decode_speedup_over_{short}") is not None]
        if record["pruned"] and there:
            told.append(
                f"  {record['method']} over {', '.join(there)}: decoding {_each(record, 'decode_speedup_over', there)}"
                f" (by mean steps {_each(record, 'decode_mean_speedup_over', there)},"
                f" bytes allow {_each(record, 'bytes_allow_over', there)}),"
                f" prompt {_each(record, 'prefill_speedup_over', there)},"
                f" cache {_each(record, 'cache_share_of', there)}"
            )
    return "\n".join(told or ["  no ratio"])


def _each(record: dict, what: str, there: list[str]) -> str:
    return " / ".join(f"{record[f'{what}_{short}']:.2f}x" for short in there)


def pool(record: dict) -> str:
    """One method in the fixed-pool test."""
    where = f"pool of {record['pool_gb']:g} GB, {record['requests']} requests of {record['context']}"
    found = f"{record['most_running']:>3} at once, {record['tokens_per_second']:>9.1f} tokens/s"
    if "new_tokens" in record:
        where += f" + {record['new_tokens']}"
        found += " ({:.1f} to {:.1f} in {} repeats)".format(*record["tokens_per_second_spread"], record["repeats"])
    if record["pruned"]:
        found += f"  {record['most_running_over_dense']:.2f}x the rows of dense"
        found += f" and {record['tokens_per_second_over_dense']:.2f}x its tokens/s"
        if "new_tokens" in record:
            found += " ({:.2f} to {:.2f})".format(*record["tokens_per_second_over_dense_spread"])
        if "live_share_at_end" in record:
            found += f", {record['live_share_at_end']:.0%} of the keys alive at the end"
    return f"{where}: {record['method']:<24} {found}"


def best(record: dict) -> str:
    """One method at its own best batch."""
    told = [
        f"{record[f'speedup_over_{short}']:.2f}x {name}"
        for short, name in NAMES.items()
        if record.get(f"speedup_over_{short}") is not None
    ]
    return (
        f"best batch at {record['context']:>6}: {record['method']:<24} {record['tokens_per_second']:>9.1f} tokens/s at "
        f"batch {record['batch']:>3}  {', '.join(told)}"
    ).rstrip()


def break_even(record: dict) -> str:
    """From which context on pruning pays."""
    context = record["break_even_context"]
    where = "at no context measured" if context is None else f"from {context} tokens on"
    return f"as fast as dense in our engine at batch {record['batch']}: {record['method']} {where}"
