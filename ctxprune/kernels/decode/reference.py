"""What is one decoding step, with no tricks? Each row's slots one after the other, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ctxprune.kernels.decode.pages import Pages


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
    """Arguments and result as kernels.decode_attention."""
    groups = query.shape[1] // key.shape[1]
    output = torch.zeros(*query.shape[:2], value.shape[-1], dtype=torch.float64, device=query.device)
    for row, now in enumerate(step.tolist()):
        if now < 0:
            continue
        slot = int(pages.free[row]) if pages.free[row] >= 0 else int(pages.used[row])
        if slot >= pages.table.shape[1] * pages.page or pages.table[row, slot // pages.page] < 0:
            pages.refused[row] += 1
            output[row] = torch.nan
            continue
        pages.used[row] = max(int(pages.used[row]), slot + 1)
        page, place = int(pages.table[row, slot // pages.page]), slot % pages.page
        pages.keys[page, :, place], pages.values[page, :, place] = key[row], value[row]
        pages.guard[page, place], pages.drop_time[page, place] = guard[row], drop_time[row]
        pages.position[page, place] = now
        if interaction_key is not None and pages.interaction is not None:
            pages.interaction[page, place] = interaction_key[row]
        logits, values, pages.free[row] = [], [], -1
        for slot in range(int(pages.used[row])):
            page, place = int(pages.table[row, slot // pages.page]), slot % pages.page
            if interaction_query is not None and pages.interaction is not None and beta is not None:
                product = interaction_query[row].double() @ pages.interaction[page, place].double()
                x = product / math.sqrt(interaction_query.shape[-1]) + beta.double()
                if x <= 0 and pages.guard[page, place] <= now < pages.drop_time[page, place]:
                    pages.drop_time[page, place] = now
            if now < pages.drop_time[page, place]:
                keys, own = (t[page, :, place].double() for t in (pages.keys, pages.values))
                logits.append((query[row].double() * keys.repeat_interleave(groups, 0)).sum(-1) * scale)
                values.append(own.repeat_interleave(groups, 0))
            elif pages.free[row] < 0:
                pages.free[row] = slot
        weights = torch.softmax(torch.stack(logits), 0)
        output[row] = (weights[..., None] * torch.stack(values)).sum(0)
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
    """Arguments and result as kernels.extend_attention: one token after the other."""
    outputs = []
    for i in range(query.shape[2]):
        gate_query = None if interaction_query is None else interaction_query[:, i]
        gate_key = None if interaction_key is None else interaction_key[:, i]
        pages.free.fill_(-1)  # a token takes the next slot, not one that is free
        token = (query[:, :, i], key[:, :, i], value[:, :, i], gate_query, gate_key, beta)
        outputs.append(decode_attention(*token, step[:, i], guard[:, i], drop_time[:, i], pages, scale))
    pages.free.fill_(-1)
    return torch.stack(outputs, 2)
