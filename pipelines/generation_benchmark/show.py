"""What did a run with format=json say? `python -m pipelines.generation_benchmark.show < x.jsonl` prints its table."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator

from pipelines.generation_benchmark import lines, ratios


def table(records: Iterable[dict]) -> Iterator[str]:
    """The lines that the same run prints with format=text."""
    told = {"pool": lines.pool, "best batch": lines.best, "break even": lines.break_even}
    headed = False
    of_a_case = lambda one: (one.get("table"), one.get("context"), one.get("batch"))  # noqa: E731
    for (name, *_), group in itertools.groupby(records, of_a_case):
        rows = list(group)
        if name is None:
            yield from map(lines.parity, rows)
            continue
        if not headed:
            yield lines.head(rows[0]["gates"], rows[0]["model"])
            headed = True
        if name != "methods":
            yield from map(told[name], rows)
            continue
        yield from map(lines.line, rows)
        yield lines.comparison(ratios.compared(rows))  # once more: an older file may lack some


if __name__ == "__main__":
    print("\n".join(table(map(json.loads, sys.stdin))))
