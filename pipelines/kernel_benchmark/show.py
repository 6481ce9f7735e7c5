"""What did a run with format=json say? `python -m pipelines.kernel_benchmark.show < records.jsonl` prints its table."""

from __future__ import annotations

import json
import sys

from pipelines.kernel_benchmark import lines

if __name__ == "__main__":
    print("\n".join(lines.table(map(json.loads, sys.stdin))))
