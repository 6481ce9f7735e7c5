"""How much memory does a pass need at its peak, beyond its inputs? Measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

import torch

from pipelines.config import KernelsConfig
from pipelines.kernel_benchmark.peer import Peer, results
from pipelines.kernel_benchmark.problem import Problem


def peak_memory(operation: str, name: str, settings: KernelsConfig, given: Problem, device: torch.device) -> int:
    """Bytes beyond the problem that an operation's main pass needs at its peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the other process needs it
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(1) as pool:
        path = str(Path(folder) / "problem.pt")
        torch.save(vars(given), path)
        found = pool.apply(_peak, (operation, name, settings, path, str(device)))
        # Let it end by itself: compilers clean up behind them.
        pool.close()
        pool.join()
        return found


def _peak(operation: str, name: str, settings: KernelsConfig, path: str, place: str) -> int:
    from pipelines.kernel_benchmark import OPERATIONS

    device, module = torch.device(place), OPERATIONS[operation]
    given = Problem(**torch.load(path, map_location=device, weights_only=True))
    peers: list[Peer] = module.peers(settings, device, given.query.shape[1])
    peer = next(peer for peer in peers if peer.name == name)
    # Libraries allocate workspaces at their first call, compilers work at each new length; that is not the peer's.
    results(peer.prepare(given if peer.compiles else given.first(64)), module.MAIN)
    ready = peer.prepare(given)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results(ready, module.MAIN)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    results(ready, module.MAIN)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
