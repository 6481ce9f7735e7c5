"""How much memory does a method take at its peak, beyond the weights? Measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ctxprune import checkpoint
from ctxprune.checkpoint import model_folder
from ctxprune.retrofitting import gate_parameters
from pipelines.config import GenerationConfig
from pipelines.generation_benchmark.clock import SHORT, WARM_UP
from pipelines.generation_benchmark.method import Peer
from pipelines.generation_benchmark.peers import peers
from pipelines.generation_benchmark.subject import Subject, random_subject, twin_of
from pipelines.kernel_benchmark.memory import _status

STEPS = 4
"""Tokens written after the prompt: a cache is whole at once."""


def peak_memory(peer: Peer, subject: Subject, settings: GenerationConfig, prompts: Tensor) -> int:
    """Bytes beyond the model that reading the prompts and writing a little needs at its peak."""
    if prompts.is_cuda:
        torch.cuda.empty_cache()  # the other process needs it
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(1) as pool:
        path = str(Path(folder) / "case.pt")
        gates = [[one.detach().cpu() for one in gate_parameters(model)] for model in subject.pruned.values()]
        torch.save({"prompts": prompts.cpu(), "gates": gates}, path)
        found = pool.apply(_peak, (peer.name, settings, path, str(prompts.device)))
        pool.close()
        pool.join()
        return found


def _peak(name: str, settings: GenerationConfig, path: str, place: str) -> int:
    device, case = torch.device(place), torch.load(path, weights_only=True)
    subject, prompts = _again(settings, case["gates"], device), case["prompts"].to(device)
    peer = next(peer for peer in peers(subject, settings) if peer.name == name)
    # Libraries allocate workspaces at their first call; that is not the method's.
    method = peer.make(prompts[:, :SHORT])
    method.read()
    method.steps(WARM_UP)
    method = peer.make(prompts)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method.read()
        method.steps(STEPS)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    method.read()
    method.steps(STEPS)
    return _status("VmHWM") - before


def _again(settings: GenerationConfig, gates: list[list[Tensor]], device: torch.device) -> Subject:
    """The same subject in this process, its gates as they were calibrated."""
    if settings.checkpoint is None:
        subject = random_subject(settings, device)
    else:
        model = checkpoint.load(model_folder(Path(settings.checkpoint)), device=device)
        subject = Subject(twin_of(model), {None: model}, "trained")
    with torch.no_grad():
        for model, values in zip(subject.pruned.values(), gates, strict=True):
            for parameter, value in zip(gate_parameters(model), values, strict=True):
                parameter.copy_(value)
    return subject
