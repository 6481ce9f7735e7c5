"""Does every shipped kernel compile for every architecture, without spilling and onto the matrix units? No GPU needed.

One variant of each kernel is compiled; of all widths, types, ranks and pages the tables' digests say whether anything
that their numbers depend on has changed since they were.

The golden tables change when a kernel or Triton does: look at the difference, then write them anew with
`for arch in sm_80 sm_90 gfx942; do python -m ctxprune.kernels.ahead_of_time $arch > $arch.txt; done`, in golden/.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton

from ctxprune.kernels import ahead_of_time

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = Path(__file__).parent / "golden"
WRITTEN_WITH = "3.7.1"
# In an environment of one's own: numbers of registers are the compiler's. A pin that moves cannot hide here, see below.
SAME_COMPILER = pytest.mark.skipif(triton.__version__ != WRITTEN_WITH, reason="another Triton has another compiler")
LARGEST_SPILL = 64
"""Bytes per thread."""


def test_the_tables_are_of_the_triton_that_is_pinned():
    """Or a new pin would leave out every test of them without a word: write them anew with it."""
    assert f"triton=={WRITTEN_WITH}" in (ROOT / "constraints.txt").read_text().splitlines()


def start(architecture: str, *more: str) -> subprocess.Popen[str]:
    """The command, in an environment in which Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ctxprune.kernels.ahead_of_time", architecture, *more]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    """What the command prints for each architecture; all at once, since each takes one core."""
    running = {architecture: start(architecture, "--sample") for architecture in ahead_of_time.ARCHITECTURES}
    return {architecture: process.communicate()[0] for architecture, process in running.items()}


def rows(table: str) -> list[tuple[str, ahead_of_time.Compiled]]:
    """The kernels of a table with their numbers."""
    columns = len(dataclasses.fields(ahead_of_time.Compiled))
    found = []
    for line in table.splitlines()[1:]:
        if line.startswith("sources "):
            continue
        *name, _ = (words := line.split())[:-columns]
        found.append((" ".join(name), ahead_of_time.Compiled(*map(int, words[-columns:]))))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@SAME_COMPILER
@pytest.mark.parametrize("architecture", ahead_of_time.ARCHITECTURES)
def test_every_kernel_compiles_to_what_the_golden_table_says(tables, architecture):
    written = (GOLDEN / f"{architecture}.txt").read_text()
    assert [line for line in tables[architecture].splitlines() if line not in written.splitlines()] == []
    here = [s for s in ahead_of_time.collect() if ahead_of_time.ARCHITECTURES[architecture] in s.families]
    compiled = [name for name, _ in rows(tables[architecture])]
    assert {s.function for s in here if s.name in compiled} == {s.function for s in here}, "each kernel, once"
    assert len(compiled) == len({s.function for s in here})


@SAME_COMPILER
def test_golden_tables_are_of_these_sources():
    code = (
        "import sys; from ctxprune.kernels.ahead_of_time import sources as s; print(*map(s, sys.argv[1:]), sep=chr(10))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *ahead_of_time.ARCHITECTURES]
    now = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True).stdout
    written = [(GOLDEN / f"{name}.txt").read_text().splitlines()[-1] for name in ahead_of_time.ARCHITECTURES]
    assert now.splitlines() == written


def test_digest_changes_with_what_is_launched(monkeypatch):
    one = ahead_of_time.Shipped("one", SimpleNamespace(cache_key="its source"), {"n": "i32"}, {"ROWS": 64}, 4, 3)
    changes = {"function": SimpleNamespace(cache_key="another"), "signature": {"n": "i64"}, "constants": {}, "warps": 8}
    digests = set()
    for shipped in (one, *(dataclasses.replace(one, **{name: value}) for name, value in changes.items())):
        monkeypatch.setattr(ahead_of_time, "collect", lambda shipped=shipped: [shipped])
        digests |= {ahead_of_time.sources("sm_90"), ahead_of_time.sources("sm_90")}
    assert len(digests) == 5


@pytest.mark.parametrize("architecture", ahead_of_time.ARCHITECTURES)
def test_golden_tables_show_no_fault(architecture):
    text = (GOLDEN / f"{architecture}.txt").read_text()
    assert "does not compile" not in text
    table = rows(text)
    assert {name for name, _ in table} == {
        shipped.name
        for shipped in ahead_of_time.collect()
        if ahead_of_time.ARCHITECTURES[architecture] in shipped.families
    }
    for name, compiled in table:
        assert faults(compiled, architecture) == [], name


def faults(compiled: ahead_of_time.Compiled, architecture: str) -> list[str]:
    """What makes a kernel slow, as far as its code says."""
    found = {
        "spills": compiled.stack > LARGEST_SPILL,
        "shared memory": compiled.shared > ahead_of_time.SHARED_LIMIT[architecture],
        "no matrix instructions": compiled.dots > 0 and compiled.matrix == 0,
        # What ptxas makes of a kernel whose launch bounds it took for 2,048 threads.
        "registers collapsed": compiled.dots > 0 and compiled.registers <= 32,
    }
    return [name for name, wrong in found.items() if wrong]


def test_each_fault_is_found():
    good = ahead_of_time.Compiled(registers=128, stack=0, shared=1000, dots=2, matrix=64, copies=8)
    assert faults(good, "sm_90") == []
    for name, change in {
        "spills": {"stack": 65},
        "shared memory": {"shared": 10**6},
        "no matrix instructions": {"matrix": 0},
        "registers collapsed": {"registers": 32},
    }.items():
        assert faults(dataclasses.replace(good, **change), "sm_90") == [name]


def test_what_does_not_compile_is_a_line_and_exit_code_1(monkeypatch, capsys):
    broken = ahead_of_time.Shipped("broken", None, {}, {}, 4, 1)
    monkeypatch.setattr(ahead_of_time, "collect", lambda: [broken])
    monkeypatch.setattr(ahead_of_time, "measured", lambda *_: ahead_of_time._isolated(fail))
    assert ahead_of_time.main(["sm_90"]) == 1
    text = capsys.readouterr().out
    assert "broken" in text and "does not compile: ZeroDivisionError" in text
    monkeypatch.setattr(ahead_of_time, "measured", lambda *_: ahead_of_time._isolated(os.abort))
    assert ahead_of_time.main(["sm_90"]) == 1
    assert "the compiler ended its process" in capsys.readouterr().out


def fail() -> None:
    raise ZeroDivisionError("no")
