"""What do the Triton kernels compile to, without a GPU?

`python -m ctxprune.kernels.ahead_of_time sm_80 sm_90 gfx942` prints it.
One line per kernel and architecture: registers, spills, shared memory, tensor-core and asynchronous-copy instructions.
A kernel's speed cannot be seen so, but most ways to lose it can.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = {"sm_80": "ampere", "sm_90": "hopper", "gfx942": "cdna"}
"""Architectures that kernels are compiled for, and the family whose block sizes each uses."""

FAMILIES = tuple(ARCHITECTURES.values())

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one program may take."""

WITHOUT_NVIDIA = {"PTX": False, "PRECISION": "ieee"}
"""Constants that are otherwise where inline PTX and TF32 do not exist."""


@dataclass(frozen=True)
class Shipped:
    """One variant of a kernel that users run, as the launcher would compile it.

    signature: Triton type of each argument that is not a compile-time constant, in order. Pointers, and numbers whose
    name ends in `stride`, are taken to be multiples of 16, as the launcher finds them for ordinary tensors.
    families: where this variant is used; block sizes may differ from one to another.
    usual: whether `--usual` compiles it too: what most models train and decode with. `--sample` takes only the first.
    """

    name: str
    function: Any
    signature: dict[str, str]
    constants: Mapping[str, object]
    warps: int
    stages: int
    families: tuple[str, ...] = FAMILIES
    usual: bool = True


@dataclass(frozen=True)
class Compiled:
    """What became of it. stack: spilled bytes per thread; dots: products that belong on tensor cores (not float32);
    matrix: the instructions that do them; copies: asynchronous loads to shared memory (0 on AMD, which has none)."""

    registers: int
    stack: int
    shared: int
    dots: int
    matrix: int
    copies: int


def collect() -> list[Shipped]:
    """All that the modules kernels.*.triton_* ship, by name. Imports them."""
    from ctxprune import kernels

    found: list[Shipped] = []
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        if module.name.split(".")[-1].startswith("triton_"):
            found += getattr(importlib.import_module(module.name), "shipped", list)()
    return sorted(found, key=lambda shipped: shipped.name)


def measure(shipped: Shipped, architecture: str) -> Compiled:
    """Compile one kernel in this process. Raises whatever the compiler raises; a failed assertion in it ends the
    process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = architecture.startswith("sm_")
    target = GPUTarget("cuda", int(architecture[3:]), 32) if nvidia else GPUTarget("hip", architecture, 64)
    constants = _constants(shipped, architecture)
    names = shipped.function.arg_names
    signature = {name: "constexpr" if name in constants else shipped.signature[name] for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or (name.endswith("stride") and name not in constants)
    }
    source = ASTSource(shipped.function, signature, constants, aligned)
    compiled = triton.compile(source, target, {"num_warps": shipped.warps, "num_stages": shipped.stages})
    dots = [line for line in compiled.asm["ttir"].splitlines() if "tt.dot " in line]
    dots = [line for line in dots if "tf32" in line or not re.search(r"xf32> \* ", line)]
    read = _read_cubin(compiled.asm["cubin"]) if nvidia else _read_amdgcn(compiled.asm["amdgcn"])
    return Compiled(**read, shared=compiled.metadata.shared, dots=len(dots))


def _constants(shipped: Shipped, architecture: str) -> Mapping[str, object]:
    if architecture.startswith("sm_"):
        return shipped.constants
    return {name: WITHOUT_NVIDIA.get(name, value) for name, value in shipped.constants.items()}


def _read_cubin(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        machine_code = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    number = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": number["REG"],
        "stack": number["STACK"] + number["LOCAL"],
        "matrix": len(re.findall(r"\bH(?:G)?MMA\.", machine_code)),
        "copies": len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", machine_code)),
    }


def _read_amdgcn(text: str) -> dict[str, int]:
    number = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    return {
        "registers": number["vgpr_count"],
        "stack": 4 * number["vgpr_spill_count"],
        "matrix": len(re.findall(r"\bv_mfma_", text)),
        "copies": 0,
    }


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measured(shipped: Shipped, architecture: str) -> Compiled | str:
    """The same from Triton's cache folder, or in a process of its own; a string says why it does not compile."""
    from triton import knobs

    stored = Path(knobs.cache.dir) / f"ahead_of_time_{_digest(_asked(shipped, architecture))}.json"
    if stored.exists():
        return Compiled(**json.loads(stored.read_text()))
    result = _isolated(measure, shipped, architecture)
    if isinstance(result, Compiled):
        stored.parent.mkdir(parents=True, exist_ok=True)
        half = stored.with_suffix(f".{os.getpid()}")
        half.write_text(json.dumps(asdict(result)))
        half.replace(stored)
    return result


def _asked(shipped: Shipped, architecture: str) -> tuple[object, ...]:
    """All that the result depends on."""
    from triton import __version__

    launch = (shipped.signature, shipped.warps, shipped.stages, sorted(_constants(shipped, architecture).items()))
    return __version__, architecture, shipped.function.cache_key, *launch


def _digest(what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()


def sources(architecture: str) -> str:
    """The last line of a whole table: a digest of every kernel's source and launch. As long as it is the same, so are
    all numbers above, and nothing needs to be compiled to know it."""
    asked = [_asked(shipped, architecture) for shipped in collect() if ARCHITECTURES[architecture] in shipped.families]
    return f"sources {_digest(asked)[:16]}"


def _isolated(work: Callable[..., Compiled], *arguments: object) -> Compiled | str:
    """work(*arguments) in a forked process: what is imported stays imported, and an abort ends only the fork."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, work, arguments))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = "the compiler ended its process"
    child.join()
    return result


def _send(sender, work: Callable[..., Compiled], arguments: tuple) -> None:
    try:
        sender.send(work(*arguments))
    except Exception as error:  # whatever the compiler raises becomes a line of the table
        sender.send(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")


HEADER = f"{'kernel':54} {'arch':6} {'registers':>9} {'stack':>6} {'shared':>7} {'dots':>4} {'matrix':>6} {'copies':>6}"


def line(name: str, architecture: str, result: Compiled | str) -> str:
    """One line of the table, of columns that do not depend on the other lines."""
    if isinstance(result, str):
        return f"{name:54} {architecture:6} does not compile: {result}"
    return (
        f"{name:54} {architecture:6} {result.registers:9} {result.stack:6} {result.shared:7} {result.dots:4} "
        f"{result.matrix:6} {result.copies:6}"
    )


def main(arguments: list[str]) -> int:
    """Print the table; returns 1 if something does not compile."""
    parser = argparse.ArgumentParser(
        prog="python -m ctxprune.kernels.ahead_of_time", description=__doc__.splitlines()[0]
    )
    parser.add_argument("architecture", nargs="+", choices=ARCHITECTURES)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="kernels whose name contains this")
    parser.add_argument("--usual", action="store_true", help="without the rarer widths, types and ranks")
    parser.add_argument("--sample", action="store_true", help="of every kernel only the first of the usual variants")
    chosen = parser.parse_args(arguments)
    failed = 0
    seen: set[tuple[object, str]] = set()
    print(HEADER, flush=True)
    for shipped in collect():
        if chosen.only and not any(text in shipped.name for text in chosen.only):
            continue
        if (chosen.usual or chosen.sample) and not shipped.usual:
            continue
        for architecture in sorted(set(chosen.architecture)):
            if ARCHITECTURES[architecture] in shipped.families:
                if chosen.sample and (shipped.function, architecture) in seen:
                    continue
                seen.add((shipped.function, architecture))
                result = measured(shipped, architecture)
                failed |= isinstance(result, str)
                print(line(shipped.name, architecture, result), flush=True)
    if not (failed or chosen.only or chosen.usual or chosen.sample):
        for architecture in sorted(set(chosen.architecture)):
            print(sources(architecture))
    return int(failed)


if __name__ == "__main__":
    if "TRITON_INTERPRET" in os.environ:
        # Kernels imported under the interpreter cannot be compiled, and this package may import them before us.
        compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        sys.exit(
            subprocess.run(
                [sys.executable, "-m", "ctxprune.kernels.ahead_of_time", *sys.argv[1:]], env=compiling
            ).returncode
        )
    sys.exit(main(sys.argv[1:]))
