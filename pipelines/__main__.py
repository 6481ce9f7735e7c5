"""What happens on `python -m pipelines VERB OVERRIDES`? It composes, runs the verb, turns a mistake into exit 2."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path

from ctxprune.errors import UserError
from pipelines import compose, output
from pipelines.config import Config

PLACES = {errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOSPC}
"""What is wrong with a file or folder that a person named, or with its disk."""
USAGE = "usage: python -m pipelines VERB [SETTING=VALUE ...], VERB one of " + ", ".join(compose.VERBS)


def main(arguments: list[str]) -> int:
    """Run one verb; 0 is success, 1 a trial or check that failed, 2 a person's mistake, 130 an interruption.

    Our own faults are raised: Python shows the traceback and ends with 1.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    verb, *overrides = arguments
    output.take_stdout()
    output.set_up_logging()
    try:
        config = compose.compose(verb, overrides)
        if verb == "report":
            return _report(config)
        return importlib.import_module(f"pipelines.{verb}").main(config, overrides) or 0
    except UserError as error:
        print(f"ctxprune: {compose.one_line(str(error), 2000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ctxprune: interrupted; the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has seen enough, as in `| head`
        return 141
    except OSError as error:
        if error.errno not in PLACES or error.filename is None:
            raise
        print(f"ctxprune: {compose.one_line(f'{error.filename}: {error.strerror}', 2000)}", file=sys.stderr)
        return 2


def _report(config: Config) -> int:
    from pipelines import report

    report.report(Path(config.runs) / config.sweep.name, json_lines=config.format == "json", out=output.stdout())
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code == 141:
        # The interpreter would flush the closed pipe once more on its way out, and complain.
        os._exit(code)
    sys.exit(code)
