"""What runs on this machine, and what does not? One line per part: ok, warn or no; exit 0 if the demo can run here."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import Config
from pipelines.machine import cores
from pipelines.output import emit

# Left-over of a killed compilation: torch's FileBaton waits for this file to go away (pytorch#190543).
LOCK = "lock"
# The demo's checkpoints, store and report with a wide margin, and memory for two workers and Ray.
DISK_GB, MEMORY_GB = 1.0, 3.0
DEEPSPEED = "import deepspeed, deepspeed.accelerator as a; print('\\n' + a.get_accelerator().device_name())"
# DeepSpeed takes 2 to 12 s to import on a busy laptop.
DEEPSPEED_SECONDS = 15


@dataclass
class Finding:
    """One line of the doctor."""

    what: str
    status: str
    """ok, warn (works, with a reservation) or no (does not work here)."""
    detail: str
    needed: bool = False
    """The demo cannot run without it."""


def main(config: Config, overrides: list[str]) -> int:
    """Print every finding; 0 if the demo can run here, else 1."""
    blocked = []
    for finding in examine(config):
        record = {"what": finding.what, "status": finding.status, "detail": finding.detail}
        emit(record, config.format, f"{finding.status:<4}  {finding.what}: {finding.detail}")
        if finding.needed and finding.status == "no":
            blocked.append(finding.what)
    detail = f"cannot run here: {', '.join(blocked)}" if blocked else "can run here: ./launch.sh"
    status = "no" if blocked else "ok"
    emit({"what": "demo", "status": status, "detail": detail}, config.format, f"{status:<4}  demo: {detail}")
    return 1 if blocked else 0


def examine(config: Config) -> Iterator[Finding]:
    """Every finding, quick ones first; DeepSpeed is imported meanwhile, in a process of its own because it is noisy."""
    if importlib.util.find_spec("deepspeed"):
        child = subprocess.Popen(
            [sys.executable, "-c", DEEPSPEED],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    else:
        child = None
    started = time.monotonic()
    try:
        for check in (python, torch, triton, transformers, kernels, ray, authentication, hydra, wandb):
            yield from _guarded(check.__name__, check)
        yield from _guarded("disk", lambda: disk(Path(config.runs)))
        for check in (machine, locks, ports):
            yield from _guarded(check.__name__, check)
        yield deepspeed(child, started)
    finally:
        if child is not None and child.poll() is None:
            child.kill()
            child.wait()


def python() -> Iterator[Finding]:
    """Version and platform."""
    fits = (3, 11) <= sys.version_info[:2] <= (3, 12)
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("python", "ok" if fits else "warn", detail + ("" if fits else "; tested with 3.11 and 3.12"))


def torch() -> Iterator[Finding]:
    """Version and devices; without CUDA everything runs on the CPU."""
    import torch

    yield Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads", needed=True)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding("cuda", "ok" if names else "no", ", ".join(names) or "no device; everything runs on the CPU")


def triton() -> Iterator[Finding]:
    """The language of the fused kernels."""
    present = importlib.util.find_spec("triton") is not None
    if present:
        import triton

        yield Finding("triton", "ok", triton.__version__)
    else:
        yield Finding("triton", "no", "not installed (it comes with the CUDA build of torch); the torch path is used")


def transformers() -> Iterator[Finding]:
    """The models and their tokenizers."""
    import transformers

    yield Finding("transformers", "ok", transformers.__version__, needed=True)


def kernels() -> Iterator[Finding]:
    """Every implementation of every operation, and why one cannot run here."""
    describe = getattr(importlib.import_module("ctxprune.kernels"), "describe", None)
    for row in describe() if describe else []:
        detail = row.get("reason") or "available"
        yield Finding(f"kernels {row['operation']} {row['implementation']}", "ok" if row["available"] else "no", detail)


def ray() -> Iterator[Finding]:
    """The scheduler; only its version is read, a start costs ten seconds."""
    version = importlib.metadata.version("ray")
    recent = tuple(int(part) for part in version.split(".")[:2]) >= (2, 59)
    yield Finding(
        "ray", "ok" if recent else "no", version + ("" if recent else "; 2.59 or later is needed"), needed=True
    )


def authentication() -> Iterator[Finding]:
    """Ray without a token runs any code sent to its port."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode == "token":
        yield Finding("ray authentication", "ok", "RAY_AUTH_MODE=token")
    else:
        yield Finding(
            "ray authentication", "warn", "RAY_AUTH_MODE is not token: start through ./launch.sh, which sets it"
        )


def hydra() -> Iterator[Finding]:
    """The composer of the configuration."""
    yield Finding("hydra", "ok", importlib.metadata.version("hydra-core"), needed=True)


def wandb() -> Iterator[Finding]:
    """A mirror of the records; nothing depends on it."""
    try:
        yield Finding("wandb", "ok", importlib.metadata.version("wandb"))
    except importlib.metadata.PackageNotFoundError:
        yield Finding("wandb", "warn", "not installed: use tracking=off")


def disk(runs: Path) -> Iterator[Finding]:
    """Room and permission where the runs go; the folder need not exist yet."""
    folder = runs.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e9
    writable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    detail = f"{free:.1f} GB free for {runs}"
    if not writable:
        detail += f"; {folder} is not a folder you may write to: give runs=FOLDER"
    elif free < DISK_GB:
        detail += f"; the demo needs {DISK_GB:g} GB"
    yield Finding("disk", "ok" if writable and free >= DISK_GB else "no", detail, needed=True)


def machine() -> Iterator[Finding]:
    """Cores this process may use, and memory that is free now."""
    yield Finding("cores", "ok", f"{cores()}, so {cores()} workers at a time")
    import psutil

    memory = psutil.virtual_memory()
    free, total = memory.available / 1e9, memory.total / 1e9
    enough = free >= MEMORY_GB
    detail = f"{free:.1f} of {total:.1f} GB free" + ("" if enough else f"; the demo needs about {MEMORY_GB:g} GB")
    yield Finding("memory", "ok" if enough else "warn", detail)


def locks() -> Iterator[Finding]:
    """Locks of compilations; one whose process was killed would make every later start wait for ever."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    found = sorted(folder.rglob(LOCK)) if folder.is_dir() else []
    for path in found:
        age = max(0.0, time.time() - path.stat().st_mtime) / 60
        yield Finding("stale lock", "warn", f"{path}, {age:.0f} minutes old: delete it unless a compilation is running")
    if not found:
        yield Finding("locks", "ok", f"none under {folder}")


def ports() -> Iterator[Finding]:
    """Processes of a trial talk over loopback; an open dashboard would take orders from anybody."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname(), timeout=2):
            yield Finding("loopback", "ok", "processes on this machine can talk to each other", needed=True)
    for port, what, advice in (
        (6379, "a Ray head or Redis", "a local cluster takes another port"),
        (8265, "a Ray dashboard", "its job API runs any code sent to it: stop it"),
    ):
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                yield Finding(f"port {port}", "warn", f"in use, perhaps by {what}; {advice}")
            else:
                yield Finding(f"port {port}", "ok", "free")


def deepspeed(child: subprocess.Popen | None, started: float) -> Finding:
    """Whether DeepSpeed imports, and which accelerator it chose."""
    if child is None:
        return Finding("deepspeed", "no", "not installed", needed=True)
    try:
        out, err = child.communicate(timeout=max(1.0, DEEPSPEED_SECONDS - (time.monotonic() - started)))
    except subprocess.TimeoutExpired:
        return Finding(
            "deepspeed", "warn", f"not imported after {DEEPSPEED_SECONDS} s: a busy machine, or a stale lock"
        )
    if child.returncode:
        reason = (err.strip().splitlines() or ["no message"])[-1]
        return Finding("deepspeed", "no", f"does not import: {reason}", needed=True)
    version = importlib.metadata.version("deepspeed")
    return Finding("deepspeed", "ok", f"{version}, accelerator {out.strip().splitlines()[-1]}", needed=True)


def _guarded(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A part that is missing or broken is a finding, never the end of the examination."""
    try:
        return list(check())
    except Exception as error:  # a broken package may raise anything while it is imported, and that is what is asked
        needed = name in ("torch", "transformers", "ray", "hydra", "disk", "ports")
        return [
            Finding(name, "no", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", needed)
        ]
