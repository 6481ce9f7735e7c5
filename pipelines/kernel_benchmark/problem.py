"""On what inputs is a kernel measured? One attention layer's tensors, random ones with a chosen share dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ctxprune import kernels
from pipelines.config import KernelsConfig

SEED = 0
CALIBRATION_ROWS = 2
"""Rows on which the share dropped is settled; the others differ by a fraction of a percent, and records say what they
really drop."""


@dataclass
class Problem:
    """One attention layer's inputs; the first six require gradients.

    query, key, value: (batch, heads or kv_heads, n, width); interaction_query, interaction_key: (batch, n, rank);
    beta: one number. guard, end: (batch, n), as kernels.drop_times takes them, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    interaction_query: Tensor
    interaction_key: Tensor
    beta: Tensor
    alpha: float
    guard: Tensor | None = None
    end: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """What has gradients."""
        return [self.query, self.key, self.value, self.interaction_query, self.interaction_key, self.beta]

    def gates(self) -> list[Tensor]:
        """What decides who is dropped."""
        return [self.interaction_query, self.interaction_key, self.beta]

    def to(self, device: torch.device, dtype: torch.dtype) -> Problem:
        """A copy whose first six tensors are leaves of this precision."""
        names = [one.name for one in fields(self)[:6]]
        leaves = {name: getattr(self, name).detach().to(device, dtype).requires_grad_() for name in names}
        times = {name: None if (t := getattr(self, name)) is None else t.to(device) for name in ("guard", "end")}
        return replace(self, **leaves, **times)

    def inference(self) -> Problem:
        """The same tensors without gradients."""
        names = [one.name for one in fields(self)[:6]]
        return replace(self, **{name: getattr(self, name).detach() for name in names})

    def first(self, tokens: int) -> Problem:
        """The first tokens alone, as a pass over them would have met them."""
        whole = {name: getattr(self, name)[:, :, :tokens].contiguous() for name in ("query", "key", "value")}
        gates = {
            name: getattr(self, name)[:, :tokens].contiguous() for name in ("interaction_query", "interaction_key")
        }
        guard = None if self.guard is None else self.guard[:, :tokens]
        end = None if self.end is None else self.end[:, :tokens].clamp(max=tokens)
        cut = replace(self, **whole, **gates, guard=guard, end=end)
        return cut.to(self.query.device, self.query.dtype)

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a key/value head."""
        return self.query.shape[1] != self.key.shape[1]

    def facts(self) -> dict[str, object]:
        """Its sizes, and the share of the context that the step function drops."""
        batch, heads, n, width = self.query.shape
        sizes = {"batch": batch, "heads": heads, "kv_heads": self.key.shape[1], "n": n, "width": width}
        return sizes | {"rank": self.interaction_key.shape[-1], "alpha": self.alpha, "dropped": share_dropped(self)}


@dataclass(frozen=True)
class Case:
    """A problem that is made when it is asked for; label: what its records say of it."""

    label: dict[str, object]
    problem: Callable[[str], Problem]
    """The problem for an operation: decoding has other rows, and one token more than the cache holds."""


@torch.no_grad()
def drop_times(given: Problem, impl: str = "auto") -> Tensor:
    """First query that no longer sees each key, (batch, n)."""
    return kernels.drop_times(*given.gates(), guard=given.guard, end=given.end, impl=impl)


def share_dropped(given: Problem) -> float:
    """Of the pairs of a query and an earlier key that no end forbids, those that the step function drops."""
    batch, n = given.interaction_query.shape[:2]
    column = torch.arange(n, device=given.beta.device)
    end = given.end if given.end is not None else torch.full((batch, n), n, device=given.beta.device)
    pairs = (end.clamp(max=n) - column - 1).double().sum().item()
    alive = (drop_times(given).clamp(max=n) - column - 1).double().sum().item()
    return 1.0 - alive / pairs if pairs else 0.0


def cases(settings: KernelsConfig, device: torch.device, lengths: list[int]) -> list[Case]:
    """Random problems: every length with every share dropped."""

    def case(n: int, dropped: float) -> Case:
        def problem(operation: str) -> Problem:
            rows, more = (settings.decode_batch, 1) if operation == "decoding" else (settings.batch, 0)
            return synthetic(settings, n + more, dropped, device, rows)

        return Case({"asked": dropped}, problem)

    return [case(n, dropped) for n in lengths for dropped in settings.drops]


def synthetic(settings: KernelsConfig, n: int, dropped: float, device: torch.device, rows: int) -> Problem:
    """Random inputs. dropped = 0: gates as open as at the start of training (alpha_start), no key ever gone; else the
    share that the step function drops, with gates as sharp as at the end (alpha_end).

    Lifetimes are heavy-tailed, as trained gates make them: most keys go at once, some stay for ever, because each key
    has an offset of its own, three times as large as what differs from query to query.
    """
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rank, dtype = settings.rank, getattr(torch, settings.dtype)
    query = normal(rows, settings.heads, n, settings.width)
    key, value = (normal(rows, settings.kv_heads, n, settings.width) for _ in range(2))
    interaction_query, interaction_key = normal(rows, n, rank), normal(rows, n, rank)
    interaction_query[..., 0] = rank**0.5
    interaction_key[..., 0] *= 3.0
    if dropped == 0:
        # Logits between 3.5 and 4.5: a gate keeps 98 %, and what 4,096 of them leave is still a number.
        interaction_query, interaction_key, beta = 0.3 * interaction_query, 0.3 * interaction_key, 4.0
    else:
        some = (t[:CALIBRATION_ROWS].to(device) for t in (interaction_query, interaction_key))
        beta = _offset(*some, dropped)
    alpha = settings.alpha_start if dropped == 0 else settings.alpha_end
    made = Problem(query, key, value, interaction_query, interaction_key, torch.tensor(beta), alpha)
    return made.to(device, dtype)


def _offset(interaction_query: Tensor, interaction_key: Tensor, dropped: float) -> float:
    """The beta at which the step function drops this share."""
    low, high = -30.0, 30.0
    for _ in range(20):
        middle = 0.5 * (low + high)
        beta = torch.tensor(middle, device=interaction_key.device)
        given = Problem(*(interaction_key,) * 3, interaction_query, interaction_key, beta, 1.0)
        low, high = (middle, high) if share_dropped(given) > dropped else (low, middle)
    return 0.5 * (low + high)
