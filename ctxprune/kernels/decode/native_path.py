"""How do decoding steps run on a CPU in one call each? Compiled here, at their first use, for the processor at hand."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ctxprune.kernels.checks import Refused
from ctxprune.kernels.decode.pages import Pages

NAME = "ctxprune_native"
SWITCH = "CTXPRUNE_NATIVE"
"""Environment variable; 0: the torch path instead."""
DTYPES = (torch.float32, torch.float64)
SOURCES = ("native_step.cpp", "native_math.h", "native_extend.h", "native_tile.h", "native_gates.h", "native_slots.h")
# OpenMP is torch's own, whose threads are used: it is not linked again. Infinities and NaN keep their meaning.
FLAGS = ["-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
MOST = 1024
"""Tokens at once."""
FEW = 64
"""Tokens whose interactions are worth a call here; for more, a library's products are."""
BUILD_SECONDS = 15
"""What compiling takes, for whoever waits."""
PATIENCE = 300
"""Seconds to wait for another process that compiles the same, before compiling it here too."""

log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()
_built: ModuleType | None = None
_failure = ""


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    interaction_query: Tensor | None,
    interaction_key: Tensor | None,
    beta: Tensor | None,
    step: Tensor,
    guard: Tensor,
    drop_time: Tensor,
    pages: Pages,
    scale: float,
) -> Tensor:
    """Arguments and result as kernels.decode_attention.

    Raises Refused, with nothing changed, for other types than float32 and float64 or several at once, for gradients,
    and where it is switched off or cannot be built.
    """
    if query.dtype not in DTYPES:
        raise Refused(f"query is {query.dtype}: the CPU kernel takes float32 and float64; take impl='torch'")
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise Refused("the CPU kernel has no gradients; take impl='torch'")
    token, times, state = (query, key, value), (step, guard, drop_time), _state(pages)
    if interaction_query is None or interaction_key is None or beta is None or pages.interaction is None:
        gates: tuple[Tensor, ...] = ()
    else:
        gates, state = (interaction_query, interaction_key, beta), (*state, pages.interaction)
    hint = () if pages.next is None else (pages.next.page, pages.next.place)
    output = kernel().step(token, gates, times, state, hint, scale)
    if output is None:
        raise Refused("the CPU kernel takes float32 or float64 throughout, as Pages.empty lays it out")
    pages.next = None
    return output


def extend_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    interaction_query: Tensor | None,
    interaction_key: Tensor | None,
    beta: Tensor | None,
    step: Tensor,
    guard: Tensor,
    drop_time: Tensor,
    pages: Pages,
    scale: float,
) -> Tensor:
    """Arguments and result as kernels.extend_attention.

    Raises Refused, with nothing changed, as decode_attention does, and for more than MOST tokens at once.
    """
    gated = interaction_query is not None and interaction_key is not None and beta is not None
    numbers = [query, key, value, pages.keys, pages.values]
    if gated:
        numbers += [t for t in (interaction_query, interaction_key, pages.interaction) if t is not None]
    if query.dtype not in DTYPES or any(t.dtype != query.dtype for t in numbers):
        raise Refused("the CPU kernel takes float32 or float64 throughout; take impl='torch'")
    if torch.is_grad_enabled() and any(t.requires_grad for t in numbers):
        raise Refused("the CPU kernel has no gradients; take impl='torch'")
    if query.shape[2] > MOST:
        raise Refused(f"the CPU kernel takes up to {MOST} tokens at once; take impl='torch'")
    module, state = kernel(), _state(pages)
    gates: tuple[Tensor, ...] = ()
    if interaction_query is not None and beta is not None and pages.interaction is not None:
        gates, state = (interaction_query.contiguous(), beta), (*state, pages.interaction)
    pages.store(key, value, interaction_key, step, guard, drop_time)
    return module.extend(query, gates, step.contiguous(), state, scale)


def interactions(
    hidden: Tensor, query: Tensor | None, key: Tensor | None, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """hidden (rows, n, width) times the weights (rank, width) of a gate's two layers, (rows, n, rank) each, and a copy
    of its offset, at once. A token's numbers do not depend on those beside it.

    None where a library does it as well or better: many tokens, another device or type, gradients, weights that a layer
    makes up (None), or no compiled kernel.
    """
    if query is None or key is None:
        return None
    if hidden.device.type != "cpu" or hidden.dtype not in DTYPES or hidden.shape[0] * hidden.shape[1] > FEW:
        return None
    if torch.is_grad_enabled() or hidden.dtype != query.dtype:
        return None
    try:
        return kernel().interactions(hidden, query, key, beta)
    except Refused:
        return None


def takeable_slots(pages: Pages, step: Tensor, ahead: int) -> tuple[Tensor, Tensor] | None:
    """Slots along each row's table that its tokens of this step (rows,) and the next can take: those never used, then
    those of keys that were dropped before; the first `ahead` of them, (rows, ahead), and how many there are, (rows,).
    What follows the last of fewer means nothing.

    None on another device, and without a compiled kernel.
    """
    if pages.table.device.type != "cpu":
        return None
    try:
        return kernel().takeable_slots(step.int(), pages.drop_time, pages.table, pages.used, ahead)
    except Refused:
        return None


def _state(pages: Pages) -> tuple[Tensor, ...]:
    """In the order of native_step.cpp; interaction keys follow where there are gates."""
    return (
        pages.keys, pages.values, pages.drop_time, pages.guard, pages.position, pages.table, pages.used, pages.free,
        pages.refused,
    )  # fmt: skip


def switched_off() -> bool:
    """Whether the environment asks for the torch path."""
    return os.environ.get(SWITCH) == "0"


def available() -> str:
    """Why it cannot run here, nothing if it can as far as one sees without compiling it."""
    if switched_off():
        return f"switched off ({SWITCH}=0)"
    if not all(Path(__file__).with_name(name).is_file() for name in SOURCES):
        return "its C++ sources are not installed"
    if _failure or _built is not None or _library().is_file():
        return _failure
    if sys.platform not in ("linux", "darwin"):
        return f"not tried on {sys.platform}"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    return "" if shutil.which("ninja", path=_path()) else "ninja is not installed"


def kernel() -> ModuleType:
    """The compiled module: kept by this process, else from a build before, else built now. Raises Refused, from then on
    at once, where that fails."""
    global _built, _failure
    if switched_off():
        raise Refused(f"the CPU kernel is switched off ({SWITCH}=0)")
    if _built is not None:
        return _built
    with _one_at_a_time:
        if _built is None and not _failure:
            try:
                _failure = available()
                if not _failure:
                    _built = _loaded()
            except (OSError, ImportError, RuntimeError, subprocess.SubprocessError) as error:
                # What torch's build and the disk raise: there is a path without.
                _failure = f"the CPU kernel cannot be built: {_first_error(str(error)) or type(error).__name__}"
    if _built is None:
        raise Refused(_failure)
    return _built


def _loaded() -> ModuleType:
    library = _library()
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        with _alone(library.with_suffix(".building")):
            if not library.is_file():  # another process may have built it meanwhile
                return _build(library)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(library: Path) -> ModuleType:
    """In a folder of its own, then moved: nobody meets half a library, nor torch's lock of a build that was killed."""
    log.info("building the CPU decoding kernel, once, about %d s", BUILD_SECONDS)
    path = os.environ.get("PATH", "")
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=f"{NAME}-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.utils import cpp_extension

        os.environ["PATH"] = _path()
        try:
            source = str(Path(__file__).with_name(SOURCES[0]))
            module = cpp_extension.load(NAME, [source], extra_cflags=FLAGS, build_directory=folder)
        finally:
            os.environ["PATH"] = path
        if module.__name__ == NAME:  # torch numbers a second build in one process, and its file answers to that name
            os.replace(module.__file__, library)
    return module


def _library() -> Path:
    """Where it is kept: under a name of its own for all that it is made of."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    made_of = hashlib.sha256(repr((torch.__version__, sys.implementation.cache_tag, FLAGS, _processor())).encode())
    for name in SOURCES:
        made_of.update(Path(__file__).with_name(name).read_bytes())
    return Path(root) / NAME / f"{NAME}-{made_of.hexdigest()[:16]}.so"


def _processor() -> str:
    """What -march=native looks at: a home folder may be shared by machines that differ."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "\n".join(line for line in first if line.startswith(("model name", "flags", "Features", "CPU part")))


def _path() -> str:
    """Where to look for ninja: beside this Python too, whose folder need not be on the path."""
    return os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """While no other process is in here for this file. The system forgets the lock of a process that dies."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("w") as held:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks: the same is built twice, at worst
                break
        yield


def _first_error(text: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = text.splitlines()
    return next((line.strip() for line in lines if "error:" in line), lines[0].strip() if lines else "")
