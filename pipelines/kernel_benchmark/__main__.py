"""What if hydra is not installed? `python -m pipelines.kernel_benchmark lengths=4096 dtype=bfloat16 format=json`."""

from __future__ import annotations

import sys

from ctxprune.errors import UserError
from pipelines import kernel_benchmark, output
from pipelines.compose import one_line
from pipelines.kernel_benchmark import words

if __name__ == "__main__":  # processes that measure memory import this file again
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(words.usage())
        sys.exit(0)
    output.take_stdout()
    output.set_up_logging()
    try:
        sys.exit(kernel_benchmark.main(words.read(sys.argv[1:])))
    except UserError as error:
        print(f"ctxprune: {one_line(str(error), 2000)}", file=sys.stderr)
        sys.exit(2)
