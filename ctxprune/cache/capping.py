"""Who goes when a layer holds as many keys as it may? Whom the policy itself ranks lowest.

Under a gate: the key whose logit of the current query is lowest. Without one: the oldest. Equal ones: the older.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune.cache.layer_cache import LayerCache
from ctxprune.errors import UserError

TIE = {torch.float64: 1e-9}
"""Logits that differ by less are equal: the same token twice must not be ranked by how a product was rounded."""


def enforce(
    layer: LayerCache,
    interaction_query: Float[Tensor, "rows rank"] | None,
    beta: Tensor | None,
    step: Int[Tensor, " rows"],
    cap: int,
) -> None:
    """Drop, at this step, keys of rows that would hold more than `cap` once their token has come and the gates have
    dropped what they drop. Protected keys (sinks, recent, pinned) stay.

    Raises UserError when they alone are too many.
    """
    pages = layer.pages
    table = pages.table.long()
    mine, now = table.clamp(min=0), step[:, None]
    times = pages.drop_time[mine].masked_fill((table < 0)[..., None], 0).flatten(1)
    guard, position = pages.guard[mine].flatten(1), pages.position[mine].flatten(1)
    alive = times > now
    if interaction_query is not None and pages.interaction is not None and beta is not None:
        work = torch.float64 if interaction_query.dtype == torch.float64 else torch.float32
        keys = pages.interaction[mine].flatten(1, 2).to(work)
        score = (keys @ interaction_query.to(work)[..., None]).squeeze(-1) / math.sqrt(keys.shape[-1]) + beta.to(work)
        alive &= ~((score <= 0) & (guard <= now))
        tie = TIE.get(work, 1e-5)
        score = (score / tie).round()
    else:
        score = position.double()
    # A row without a token of this step (padding) holds what it held: free slots count as alive before time 0.
    excess = (alive.sum(1) + 1 - cap).masked_fill(step < 0, 0)
    if not bool((excess > 0).any()):
        return
    candidate = alive & (guard <= now)
    if bool((excess > candidate.sum(1)).any()):
        raise UserError(
            f"max_live_tokens is {cap}, fewer than the tokens that are protected (sinks, recent, pinned): raise it"
        )
    by_age = position.argsort(dim=1)
    ranked = score.gather(1, by_age).masked_fill(~candidate.gather(1, by_age), torch.inf)
    order = by_age.gather(1, ranked.argsort(dim=1, stable=True))
    most = int(excess.max())
    goes = torch.arange(most, device=step.device) < excess[:, None]
    row, slot = goes.nonzero(as_tuple=True)
    slot = order[row, slot]
    pages.drop_time[table[row, slot // pages.page], slot % pages.page] = step[row].to(torch.int32)
