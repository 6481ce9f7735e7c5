"""What does a model drop, and when? One integer per layer, row and key: the first query that no longer sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ctxprune.retrofitting import evaluated, mode, state_of
from ctxprune.visibility import visible_pairs


@dataclass(frozen=True)
class DropTimes:
    """Drop times of a batch. Key j is visible to query k in a layer iff j <= k < drop_time[layer, row, j].

    drop_time: row index of the first query that no longer sees the key; n or more: it survives the whole row. With an
    axis of KV heads where these decide apart; counts are then means over them.
    document_end: the same if nothing were dropped (n, or where the next packed document starts). A model's own sliding
    window counts as dropped: of a layer that cannot look back further it is what any rule drops at least.
    """

    drop_time: Int[Tensor, "layers batch *kv_heads n"]
    document_end: Int[Tensor, "batch n"]

    def sparsity(self) -> Float[Tensor, " layers"]:
        """Share of the (query, previous key of the same document) pairs dropped, per layer; the mean over layers is the
        sparsity of a model. Kept pairs over all pairs, so that long contexts count for what they cost."""
        kept = self.kept_pairs().double().sum(1)
        pairs = visible_pairs(self.document_end).sum().clamp(min=1).double()
        return 1.0 - kept / pairs

    def kept_pairs(self) -> Shaped[Tensor, "layers batch"]:
        """Pairs (query, earlier key it sees) per layer and row."""
        n = self.drop_time.shape[-1]
        column = torch.arange(n, device=self.drop_time.device)
        return _over_heads((self.drop_time.clamp(max=n) - column - 1).sum(-1), 2)

    def live(self, query: int) -> Bool[Tensor, "layers batch *kv_heads n"]:
        """Which keys query `query` (a row index) sees, itself included."""
        column = torch.arange(self.drop_time.shape[-1], device=self.drop_time.device)
        return (column <= query) & (query < self.drop_time)

    def live_counts(self) -> Shaped[Tensor, "layers batch n"]:
        """How many keys each query sees, itself included: births minus deaths, summed along the row."""
        n = self.drop_time.shape[-1]
        deaths = torch.zeros(*self.drop_time.shape[:-1], n + 1, dtype=torch.long, device=self.drop_time.device)
        deaths.scatter_add_(-1, self.drop_time.clamp(max=n).long(), torch.ones_like(self.drop_time, dtype=torch.long))
        born = torch.arange(1, n + 1, device=self.drop_time.device)
        return _over_heads(born - deaths[..., :n].cumsum(-1), 3)


def _over_heads(counts: Tensor, axes: int) -> Tensor:
    """The mean over KV heads where there is an axis of them: the last but those behind (layers, batch)."""
    return counts if counts.ndim == axes else counts.double().mean(2)


@torch.no_grad()
def drop_times(
    model,
    input_ids: Int[Tensor, "batch n"],
    *,
    position_ids: Int[Tensor, "batch n"] | None = None,
    attention_mask: Int[Tensor, "batch n"] | None = None,
    prompt: Int[Tensor, " batch"] | None = None,
) -> DropTimes:
    """When a retrofitted model drops each token of input_ids in each layer, under the step function.

    position_ids restart where a new packed document starts; attention_mask is 0 at padding; prompt: the column at which
    each row's prompt is over, for policies that drop there. One forward pass; agrees with step-by-step decoding. Raises
    UserError if the model is not retrofitted.
    """
    inputs = {"position_ids": position_ids, "attention_mask": attention_mask}
    return forward_with_drop_times(model, input_ids, prompt=prompt, **inputs)[0]


@torch.no_grad()
def forward_with_drop_times(
    model, input_ids: Tensor, *, prompt: Tensor | None = None, **inputs
) -> tuple[DropTimes, Float[Tensor, "batch n vocab"]]:
    """Drop times and logits of one pass under the step function, without dropout; inputs as for drop_times."""
    state = state_of(model)
    before = state.record  # a PruningSchedule's, in the middle of a training
    state.record, state.prompt = {}, None if prompt is None else prompt.to(input_ids.device)
    try:
        with mode(model, "hard"), evaluated(model):
            logits = model(input_ids, use_cache=False, **inputs).logits
        taken = DropTimes(state.recorded(), state.documents.end)
    finally:
        state.record, state.prompt = before, None
    return taken, logits
