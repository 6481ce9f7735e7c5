"""How fast is pruned attention beside every peer that runs here? Parity first, then times in turn, then peak memory."""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import kernels
from pipelines import output
from pipelines.config import Config, KernelsConfig
from pipelines.kernel_peers import Peer, Problem, peers, reference_made_strong
from pipelines.machine import machine, versions
from pipelines.progress import Bars

PARITY_TOKENS = 96
"""Tokens of the problem on which our results are held against the float64 reference before anything is timed."""
PARITY = {"float32": 2e-5, "bfloat16": 4e-2, "float16": 6e-3}
"""Largest error over the largest entry, outputs and gradients; twice that of the n x n form in the same precision where
that is more: with sharp gates the rounding of their logits decides."""
SEED = 0


def main(config: Config) -> int:
    """Emit one record per peer, problem and pass; 1 where our own results are wrong (nothing is timed then)."""
    settings = config.kernels
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong, allowed = disagreement(settings, device)
    record = {"kind": "parity", "passed": wrong <= allowed, "error": wrong, "allowed": allowed}
    measure = f"largest error {wrong:.1e} (output and every gradient), allowed {allowed:.1e}"
    if wrong > allowed:
        output.emit(record, config.format, f"parity FAILED: {measure}; nothing was timed")
        return 1
    output.emit(record, config.format, f"parity with the float64 reference: {measure}\n{_head()}")
    with Bars() as bars, bars.task("kernels (problems)", len(settings.lengths) * len(settings.drops)) as advance:
        for done, (n, dropped) in enumerate((n, d) for n in settings.lengths for d in settings.drops):
            for record in measured(settings, n, dropped, config.benchmark.repeats, device):
                output.emit(record, config.format, _line(record))
            advance(done + 1)
    return 0


def problem(settings: KernelsConfig, n: int, dropped: float, device: torch.device, dtype: torch.dtype) -> Problem:
    """Random inputs. dropped = 0: gates as open as at the start of training (alpha_start), no key ever gone; else the
    share that the step function drops, with gates as sharp as at the end (alpha_end).

    Lifetimes are heavy-tailed, as trained gates make them: most keys go at once, some stay for ever, because each key
    has an offset of its own, three times as large as what differs from query to query.
    """
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, dtype).requires_grad_()

    batch, rank = settings.batch, settings.rank
    query = normal(batch, settings.heads, n, settings.width)
    key, value = (normal(batch, settings.kv_heads, n, settings.width) for _ in range(2))
    interaction_query, interaction_key = normal(batch, n, rank), normal(batch, n, rank)
    interaction_query[..., 0] = rank**0.5
    interaction_key[..., 0] *= 3.0
    if dropped == 0:
        # Logits between 3.5 and 4.5: a gate keeps 98 %, and what 4,096 of them leave is still a number.
        interaction_query, interaction_key, beta = 0.3 * interaction_query, 0.3 * interaction_key, 4.0
    else:
        beta = _offset(interaction_query, interaction_key, dropped)
    tensors = [query, key, value, interaction_query, interaction_key, torch.tensor(beta)]
    return Problem(*map(leaf, tensors), settings.alpha_start if dropped == 0 else settings.alpha_end)


def _offset(interaction_query: torch.Tensor, interaction_key: torch.Tensor, dropped: float) -> float:
    """The beta at which the step function drops this share."""
    low, high = -30.0, 30.0
    for _ in range(20):
        middle = 0.5 * (low + high)
        over = _share_dropped(interaction_query, interaction_key, torch.tensor(middle)) > dropped
        low, high = (middle, high) if over else (low, middle)
    return 0.5 * (low + high)


@torch.no_grad()
def _share_dropped(interaction_query: torch.Tensor, interaction_key: torch.Tensor, beta: torch.Tensor) -> float:
    n = interaction_query.shape[1]
    alive = (
        kernels.drop_times(interaction_query, interaction_key, beta).clamp(max=n) - torch.arange(n).to(beta.device) - 1
    )
    return 1.0 - alive.double().sum().item() / (len(alive) * max(1, n * (n - 1) // 2))


def disagreement(settings: KernelsConfig, device: torch.device) -> tuple[float, float]:
    """Largest error of our output and gradients over the largest entry, against the float64 reference, and the error
    allowed."""
    dtype, wrong, allowed = getattr(torch, settings.dtype), 0.0, PARITY[settings.dtype]
    plain = Peer("", reference_made_strong, True)
    reference = Peer("", lambda p: kernels.pruned_attention(*p.tensors(), p.alpha, impl="reference"), True)
    for dropped in settings.drops:
        given = problem(dataclasses.replace(settings, batch=2), PARITY_TOKENS, dropped, device, dtype)
        exact = _results(reference, given)
        allowed = max(allowed, 2 * _largest_error(_results(plain, given), exact))
        ours = [peer for peer in peers(device) if peer.name.startswith("ctxprune")]
        wrong = max([wrong, *(_largest_error(_results(peer, given), exact) for peer in ours)])
    return wrong, allowed


def _largest_error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    errors = [
        (one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1.0)
        for one, other in zip(found, exact, strict=True)
    ]
    return max(error.nan_to_num(torch.inf).item() for error in errors)


def measured(
    settings: KernelsConfig, n: int, dropped: float, repeats: int, device: torch.device
) -> Iterator[dict[str, object]]:
    """One record per peer: medians and extremes of forward, and of forward and backward, peers in turn."""
    given = problem(settings, n, dropped, device, getattr(torch, settings.dtype))
    known = peers(device)
    here = [peer for peer in known if peer.absent is None and _fits(peer, settings, n)]
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(-1, repeats):
        for peer in here:
            for name, run in (("forward", _forward), ("both", _results)):
                start = _now(device)
                run(peer, given)
                if repeat >= 0:
                    times.setdefault((peer.name, name), []).append(_now(device) - start)
    realised = _share_dropped(given.interaction_query, given.interaction_key, given.beta)
    base = {"kind": "kernels", "n": n, "dropped": realised, "alpha": given.alpha, **dataclasses.asdict(settings)}
    for peer in known:
        record = base | {"peer": peer.name, "gated": peer.gated, "machine": machine(), "versions": versions()}
        if peer not in here:
            yield record | {"absent": peer.absent or "its n x n tensors are more than kernels.largest_gb allows"}
            continue
        for name in ("forward", "both"):
            own = sorted(times[peer.name, name])
            record[f"{name}_ms"] = 1e3 * statistics.median(own)
            record[f"{name}_ms_spread"] = [1e3 * own[0], 1e3 * own[-1]]
        record["peak_bytes"] = peak_memory(peer.name, settings, n, dropped, device)
        yield record


def peak_memory(name: str, settings: KernelsConfig, n: int, dropped: float, device: torch.device) -> int:
    """Bytes beyond the inputs that forward and backward need at their peak, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (name, settings, n, dropped, str(device)))


def _peak(name: str, settings: KernelsConfig, n: int, dropped: float, place: str) -> int:
    device = torch.device(place)
    peer = next(peer for peer in peers(device) if peer.name == name)
    # Libraries allocate workspaces at their first call; they are not the peer's.
    _results(peer, problem(settings, 64, dropped, device, getattr(torch, settings.dtype)))
    given = problem(settings, n, dropped, device, getattr(torch, settings.dtype))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _results(peer, given)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    _results(peer, given)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _forward(peer: Peer, given: Problem) -> torch.Tensor:
    with torch.no_grad():
        return peer.forward(given)[0]


def _results(peer: Peer, given: Problem) -> list[torch.Tensor]:
    """Output and gradients of a loss that weighs every output differently."""
    out, alive = peer.forward(given)
    weight = torch.linspace(-1.0, 1.0, out.shape[-1], device=out.device, dtype=out.dtype)
    loss = (out * weight).sum() + (0.1 * alive.sum() if alive is not None else 0.0)
    wanted = given.tensors() if peer.gated else given.tensors()[:3]
    return [out.detach(), *torch.autograd.grad(loss, wanted)]


def _fits(peer: Peer, settings: KernelsConfig, n: int) -> bool:
    """Whether a peer's n x n tensors, about five per head with their gradients, stay below the limit."""
    return not peer.quadratic or 20 * settings.batch * settings.heads * n * n <= 1e9 * settings.largest_gb


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _head() -> str:
    columns = ("peer", "n", "dropped", "alpha", "forward ms", "both ms", "spread of both", "peak MB")
    return "{:<28} {:>6} {:>8} {:>6} {:>11} {:>10} {:>19} {:>9}".format(*columns)


def _line(record: dict) -> str:
    start = f"{record['peer']:<28} {record['n']:>6} {record['dropped']:>8.1%} {record['alpha']:>6.2f}"
    if "absent" in record:
        return f"{start} {record['absent']:>11}"
    low, high = record["both_ms_spread"]
    times = f"{record['forward_ms']:>11.1f} {record['both_ms']:>10.1f} {f'{low:.1f} to {high:.1f}':>19}"
    return f"{start} {times} {record['peak_bytes'] / 1e6:>9.0f}"
