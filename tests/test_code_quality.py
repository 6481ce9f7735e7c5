"""Does the code keep its own rules? Lint and format everywhere, types where a library user meets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "--no-cache"], ["ruff", "format", "--check", "--no-cache"], ["mypy"]],
    ids=["lint", "format", "types"],
)
@pytest.mark.slow
def test_nothing_to_mend(command, tmp_path):
    extra = ["--cache-dir", str(tmp_path)] if command == ["mypy"] else []
    found = subprocess.run([sys.executable, "-m", *command, *extra], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
