"""How does a person read the records? One line each, and one per operation that says what to make of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby


def table(records: Iterable[dict]) -> Iterator[str]:
    """All lines of a run, from its records in the order in which they were emitted."""
    for kind, same in groupby(records, key=lambda record: record["kind"]):
        if kind == "parity":
            yield from map(parity, same)
            continue
        yield head()
        for _, group in groupby(same, key=lambda r: (r["operation"], r["n"], r["dropped"], r.get("layer"))):
            problem = list(group)
            yield from map(line, problem)
            yield comparison(problem)


def parity(record: dict) -> str:
    """Whether an operation's results are right."""
    measure = f"largest error {record['error']:.1e}, allowed {record['allowed']:.1e}"
    if record["passed"]:
        return f"parity of {record['operation']} with the float64 reference: {measure}"
    return f"parity of {record['operation']} FAILED: {measure}; nothing is timed"


def head() -> str:
    """Titles above the lines."""
    titles = ("operation", "peer", "n", "layer", "dropped", "median ms", "20 % to 80 %", "more")
    return "{:<9} {:<36} {:>6} {:>5} {:>8} {:>10} {:>19}  {}".format(*titles)


def line(record: dict) -> str:
    """One record, the time of its main pass first."""
    main = record["main"]
    start = f"{record['operation']:<9} {record['peer']:<36} {record['n']:>6} {record.get('layer', '-'):>5}"
    start = f"{start} {record['dropped']:>8.1%}"
    if "absent" in record:
        return f"{start} {'-':>10} {'-':>19}  {record['absent']}"
    low, high = record[f"{main}_ms_quantiles"]
    more = [f"{name} {record[f'{name}_ms']:.2f} ms" for name in ("forward", "backward") if main == "both"]
    if "peak_bytes" in record:
        more.append(f"peak {record['peak_bytes'] / 1e6:.0f} MB")
    if "gb_per_second" in record:
        more.append(f"{record['gb_per_second']:.1f} GB/s of {record['bytes_read'] / 1e6:.2f} MB")
        more.append(f"cache {record['cache_bytes'] / 1e6:.2f} MB, {record['live_share']:.1%} live")
    return f"{start} {record[f'{main}_ms']:>10.2f} {f'{low:.2f} to {high:.2f}':>19}  {', '.join(more)}".rstrip()


def comparison(records: list[dict]) -> str:
    """What our time is of the others', from the records of one problem and operation."""
    names = {
        "over_sdpa": "SDPA without gates",
        "over_reference": "the reference formulation",
        "over_dense": "the same over every key",
    }
    said = []
    for record in records:
        told = [f"{record[key]:.3f} x {name}" for key, name in names.items() if record.get(key) is not None]
        if told:
            said.append(f"{record['peer']} takes {', '.join(told)}")
    first = records[0]
    where = f"layer {first['layer']}, " if "layer" in first else ""
    return (
        f"{first['operation']}, {where}n={first['n']}, {first['dropped']:.1%} dropped: {'; '.join(said) or 'no ratio'}"
    )
