"""What if a key is needed after all? An alarm that bounds what the query would have read of dropped keys, and brings
them back.

Dropped keys wait in a cold store, in pages of 16 with the smallest and largest value of every number of their keys. For
a query these bound each of a page's logits from above (Quest, arXiv 2406.10774), and so the share of its attention that
dropped keys would have had. Where the bound is more than the alarm allows, the pages that weigh most come back and the
layer's attention is computed again with them. Only a feedback loop may do so: what a policy drops is dropped for ever.
It is approximate, and the cold store takes the memory that dropping had freed (it is read only where keys come back, so
it may lie elsewhere).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune.cache.cold_store import ColdStore, bring_back
from ctxprune.cache.layer_cache import LayerCache
from ctxprune.errors import UserError
from ctxprune.kernels.decode.pages import NEVER, Order, order_of
from ctxprune.kernels.decode.torch_path import attend
from ctxprune.precision import exactly


@dataclass
class Alarm:
    """Of one cache. share: of a query's attention, mean over heads, that dropped keys may have had (a bound, so 0.5 is
    strict); grace: steps for which keys that came back are not dropped again. checks, alarms: queries of one layer and
    row that were asked, and that were too high; revived: keys brought back."""

    share: float = 0.5
    grace: int = 32
    checks: int = 0
    alarms: int = 0
    revived: int = 0
    cold: list[ColdStore] = field(default_factory=list)
    """By layer, what was dropped."""

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise UserError(f"share is {self.share}: give a number between 0 and 1")
        if self.grace < 1:
            raise UserError(f"grace is {self.grace}: give at least 1 step")

    def store_of(self, index: int, hot: LayerCache) -> ColdStore:
        """The cold store beside a layer's pages."""
        if index == len(self.cold):
            self.cold.append(ColdStore.beside(hot))
        return self.cold[index]


def bounds(
    cold: ColdStore, query: Float[Tensor, "rows heads width"], scale: float
) -> tuple[Float[Tensor, "pages heads"], Order]:
    """Log of the most that each cold page could add to a query's softmax: its keys times exp(the largest logit)."""
    order = cold.pages.order or order_of(cold.pages.table)
    smallest, largest = (exactly(sketch[order.pages][:, :, None]) for sketch in (cold.smallest, cold.largest))
    grouped = query.to(smallest.dtype).unflatten(1, (smallest.shape[1], -1))[order.row]
    highest = torch.maximum(grouped * smallest, grouped * largest).sum(-1).flatten(1) * scale
    return highest + cold.count[order.pages].to(highest.dtype).log()[:, None], order


def live_mass(
    hot: LayerCache, query: Float[Tensor, "rows heads width"], step: Int[Tensor, " rows"], scale: float
) -> Float[Tensor, "rows heads"]:
    """Log of the sum of a query's softmax over the keys alive."""
    pages, order = hot.pages, hot.pages.order or order_of(hot.pages.table)
    keys = exactly(pages.keys[order.pages])
    alive = pages.drop_time[order.pages] > step[order.row][:, None]
    grouped = query.to(keys.dtype).unflatten(1, (keys.shape[1], -1))[order.row] * scale
    logits = (grouped @ keys.transpose(2, 3)).flatten(1, 2).masked_fill(~alive[:, None], -torch.inf)
    return _sum_by_row(torch.logsumexp(logits, -1), order, len(query))


def _sum_by_row(logs: Float[Tensor, "pages heads"], order: Order, rows: int) -> Float[Tensor, "rows heads"]:
    """Log of the sums of exponentials over each row's pages; -inf for rows without any."""
    row = order.row[:, None].expand_as(logs)
    top = logs.new_full((rows, logs.shape[1]), -torch.inf).scatter_reduce_(0, row, logs, "amax")
    base = top.clamp(min=torch.finfo(logs.dtype).min)
    return base + torch.zeros_like(base).index_add_(0, order.row, (logs - base[order.row]).exp()).log()


def attend_again(
    hot: LayerCache, query: Float[Tensor, "rows heads width"], step: Int[Tensor, " rows"], scale: float
) -> Float[Tensor, "rows heads width"]:
    """What a step's attention is over the keys that are alive now."""
    pages, order = hot.pages, hot.pages.order or order_of(hot.pages.table)
    alive = pages.drop_time[order.pages] > step[order.row][:, None]
    return attend(query[:, :, None], pages, order, alive[:, None], scale).squeeze(2)


def revive(
    alarm: Alarm,
    hot: LayerCache,
    cold: ColdStore,
    query: Float[Tensor, "rows heads width"],
    step: Int[Tensor, " rows"],
    scale: float,
) -> bool:
    """Bring back, for rows whose bound is more than the alarm allows, the pages that weigh most, until what is left is
    allowed; whether any came."""
    alarm.checks += int((step >= 0).sum())
    if cold.in_use == 0:
        return False
    logs, order = bounds(cold, query, scale)
    live = live_mass(hot, query, step, scale)
    # By page and head: its bound as a share of all that the row could read.
    everything = torch.logaddexp(live, _sum_by_row(logs, order, len(query)))
    # A row whose numbers are none hears nothing, and its neighbours theirs.
    share = (logs - everything[order.row]).exp().mean(1).nan_to_num(0.0)
    total = torch.zeros(len(query), dtype=share.dtype, device=share.device).index_add_(0, order.row, share)
    loud = (total > alarm.share) & (step >= 0)
    if not bool(loud.any()):
        return False
    # Heaviest first within each row; a page comes back while what lies behind it is still too much.
    by_share = share.argsort(descending=True)
    by_row = by_share[order.row[by_share].argsort(stable=True)]
    row = order.row[by_row]
    before = share[by_row].cumsum(0) - share[by_row]
    first = torch.full((len(query),), torch.inf, dtype=share.dtype, device=share.device)
    before = before - first.scatter_reduce_(0, row, before, "amin")[row]
    comes = torch.zeros_like(loud[order.row])
    comes[by_row] = loud[row] & (total[row] - before > alarm.share)
    until = (step + alarm.grace).clamp(min=0)
    alarm.revived += bring_back(hot, cold, order, comes, until, NEVER if hot.gated else until)
    alarm.alarms += int(loud.sum())
    return True
