"""What do a batch's pages hold when its last tokens step? The survivors of every row, page after page.

Prompts are not run: the pages are filled as all tokens but the last would have left them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ctxprune.kernels.decode.pages import NEVER, Pages
from pipelines.kernel_benchmark.problem import Problem, drop_times

PAGE = 64
"""Slots per page."""
STATE = ("drop_time", "guard", "used", "free", "refused")
"""What a step changes and the next must find as it was; the new key goes to the same slot each time."""
BEYOND_L2 = 4
"""On a GPU as many copies take turns as hold this many times its L2: a step then reads memory, as in a model whose
other layers have run in between."""
MOST_COPIES = 16


@dataclass
class Pool:
    """Pages ready for a step, and the state that each step starts from."""

    pages: Pages
    start: dict[str, Tensor]

    @staticmethod
    def of(pages: Pages) -> Pool:
        """Pages as they are now."""
        return Pool(pages, {name: getattr(pages, name).clone() for name in STATE})

    def restore(self) -> None:
        """Nothing of a step is left but the new key in its slot."""
        for name, tensor in self.start.items():
            getattr(self.pages, name).copy_(tensor)

    def copy(self) -> Pool:
        """The same pages elsewhere in memory."""
        own = {one.name: getattr(self.pages, one.name) for one in fields(self.pages)}
        return Pool.of(replace(self.pages, **{name: t if t is None else t.clone() for name, t in own.items()}))


def survivors(given: Problem) -> Tensor:
    """Which of the tokens before the last are still there when it steps: (batch, n - 1) booleans."""
    n = given.interaction_key.shape[1]
    return drop_times(given)[:, : n - 1] >= n - 1


def filled(given: Problem, keep: Tensor, gated: bool) -> Pages:
    """Pages that hold the kept tokens, (batch, n - 1), of each row in order, with room for one more.

    gated: with interaction keys, guards and ends; else every kept key stays for ever.
    """
    rows, held = keep.shape
    counts = keep.sum(1)
    each = counts // PAGE + 1
    first = each.cumsum(0) - each
    pages = Pages.empty(
        int(each.sum()), rows, int(each.max()), kv_heads=given.key.shape[1], width=given.key.shape[3],
        rank=given.interaction_key.shape[-1] if gated else None, page=PAGE, dtype=given.key.dtype,
        device=given.key.device,
    )  # fmt: skip
    row, token = keep.nonzero(as_tuple=True)
    slot = torch.arange(len(row), device=keep.device) - (counts.cumsum(0) - counts)[row]
    page, place = first[row] + slot // PAGE, slot % PAGE
    pages.keys[page, :, place] = given.key[row, :, token]
    pages.values[page, :, place] = given.value[row, :, token]
    guard, end = _times(given, held) if gated else (token, torch.full_like(token, NEVER))
    pages.guard[page, place] = (guard[row, token] if gated else guard).to(torch.int32)
    pages.drop_time[page, place] = (end[row, token] if gated else end).to(torch.int32)
    if pages.interaction is not None:
        pages.interaction[page, place] = given.interaction_key[row, token]
    order = torch.arange(pages.table.shape[1], device=keep.device)
    pages.table.copy_(torch.where(order < each[:, None], first[:, None] + order, -1))
    pages.used.copy_(counts)
    return pages


def _times(given: Problem, held: int) -> tuple[Tensor, Tensor]:
    """Guards and ends of the tokens held, as pages have them: (batch, held) each."""
    guard = torch.arange(1, held + 1, device=given.key.device).expand(given.key.shape[0], held)
    end = torch.full_like(guard, NEVER)
    if given.guard is not None:
        guard = given.guard[:, :held].clamp(max=NEVER)
    if given.end is not None:
        # An end behind the tokens at hand says nothing of the tokens to come.
        end = torch.where(given.end[:, :held] > held, NEVER, given.end[:, :held])
    return guard, end


def size(pages: Pages) -> int:
    """Bytes of the pages, keys with all that is kept beside them."""
    parts = (pages.keys, pages.values, pages.interaction, pages.drop_time, pages.guard)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def copies(one: int, device: torch.device) -> int:
    """How many copies of `one` bytes take turns."""
    if device.type != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MOST_COPIES, -(-BEYOND_L2 * l2 // max(1, one))))
