"""What does a retrofitted attention layer do differently?

It computes its gates and calls the same attention under them.

No hooks and no monkey-patching: a wrapper module takes the place of the layer's attention, computes gates from the same
normalised hidden states, and passes what it decided as one more keyword. transformers hands unknown keywords on to the
attention function registered under the model's `attn_implementation`, which is `attention` below.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ctxprune import decoding, kernels
from ctxprune.cache.pruned_cache import PrunedCache
from ctxprune.calls import Attends, Hard, PruningState, Soft
from ctxprune.errors import UserError
from ctxprune.policies.rule import Ranking, Rule
from ctxprune.ranked_calls import Ranked
from ctxprune.visibility import ends, layout, lifetimes, visible_pairs

NAME = "ctxprune"
"""The attn_implementation under which transformers finds `attention`."""
ADDED = ("position_bias", "softcap", "s_aux", "sinks", "block_indices")
"""Keywords under which models change their logits, or choose keys themselves."""
CACHE_KEYWORDS = ("past_key_values", "layer_past", "past_key_value")


class PrunedAttention(nn.Module):
    """The wrapper around one layer's attention: `inner` is untouched, `rule` says what it may forget."""

    def __init__(self, inner: nn.Module, rule: Rule, index: int, state: PruningState):
        super().__init__()
        self.inner = inner
        self.rule: Rule = rule
        self.layer_idx = index
        self.state = state
        self.window: int | None = None
        """The model's own sliding window in this layer."""

    def forward(self, *args, **kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = next((kwargs[name] for name in CACHE_KEYWORDS if kwargs.get(name) is not None), None)
        _refuse_mask(kwargs.get("attention_mask"))
        call: Soft | Hard | Attends | None
        if self.state.replay is not None:
            call = self.state.replay(self.layer_idx, hidden)
        elif isinstance(cache, PrunedCache):
            call = decoding.decide(cache, self, hidden, self._positions(kwargs, hidden), kwargs.get("attention_mask"))
        elif cache is not None and cache.get_seq_length(self.layer_idx) > 0:
            raise UserError(
                f"a {type(cache).__name__} cannot forget: generate with ctxprune.generate, model.generate or pass "
                "past_key_values=ctxprune.PrunedCache()"
            )
        else:
            call = self.decide(hidden, self._positions(kwargs, hidden), kwargs.get("attention_mask"))
        if isinstance(call, Soft) and self.state.record is not None:
            self._record_hard(call, self.state.record)
        output, report, *others = self.inner(*args, pruning=call, **kwargs)
        if isinstance(call, Soft):
            pairs = visible_pairs(self.state.documents.end).sum().clamp(min=1)
            self.state.survival[self.layer_idx] = report.sum() / pairs
            report = None
        return output, report, *others

    def _positions(self, given: dict, hidden: Tensor) -> Tensor | None:
        """Of the tokens: what the layer was told, else what the model was."""
        told, known = given.get("position_ids"), self.state.positions
        return known if told is None and known is not None and known.shape == hidden.shape[:2] else told

    def decide(
        self, hidden: Tensor, position_ids: Tensor | None, padding: Tensor | None
    ) -> Soft | Hard | Ranked | None:
        """What this layer drops in one pass over whole rows; None: nothing."""
        state = self.state
        if self.layer_idx == 0 or state.plan is None:
            state.plan = layout(hidden.shape[:2], position_ids, padding, hidden.device)
        plan = state.documents
        drop_time = ends(plan, self.lifetime(plan.position))
        if self.ranking is not None:
            return self._ranked(self.ranking, hidden, padding, drop_time)
        if self.gate is not None:
            query, key, beta = self.gate(hidden)
            guard = state.guards(plan.position)
            if self.mode == "soft":
                return Soft(query, key, beta, state.alpha, guard, drop_time, state)
            drop_time = self.inherit(kernels.drop_times(query, key, beta, guard=guard, end=drop_time))
        if state.record is not None:
            state.record[self.layer_idx] = drop_time
        return Hard(drop_time) if bool((drop_time < hidden.shape[1]).any()) else None

    def _ranked(self, ranking: Ranking, hidden: Tensor, padding: Tensor | None, end: Tensor) -> Ranked:
        """The call of a policy that ranks: it decides once queries and keys are there."""
        state, position = self.state, self.state.documents.position
        if state.prompt is None and (ranking.config.when == "prompt" or ranking.config.keep_prompt):
            raise UserError(
                f"policy {state.policy.policy} acts at the end of a prompt: say where that is (prompt=...), decode "
                "over a cache, or take when=step"
            )
        column = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
        clock = column
        if padding is not None:
            clock = column.masked_fill(~padding[:, -hidden.shape[1] :].to(column.device).bool(), -1)
        protected = position < state.policy.sinks
        return Ranked(
            ranking, hidden, state.ids, position, clock, end, protected, state.prompt, state.decisions,
            self.layer_idx, state.record,
        )  # fmt: skip

    @torch.no_grad()
    def _record_hard(self, call: Soft, record: dict[int, Tensor]) -> None:
        """The step function's drop times beside a soft pass: what the sparsity controller watches."""
        gates = (call.interaction_query, call.interaction_key, call.beta)
        taken = kernels.drop_times(*gates, guard=call.guard, end=call.end)
        if self.state.propagate_in_depth and self.layer_idx > 0:
            taken = torch.minimum(taken, record[self.layer_idx - 1])
        record[self.layer_idx] = taken

    @property
    def mode(self) -> str:
        """soft, hard or dense, with `auto` resolved."""
        if self.state.mode == "auto":
            return "soft" if self.training else "hard"
        return self.state.mode

    @property
    def gate(self) -> nn.Module | None:
        """The learned gate, unless bypassed."""
        return None if self.mode == "dense" else self.rule.gate

    @property
    def ranking(self) -> Ranking | None:
        """How keys are ranked, unless bypassed."""
        return None if self.mode == "dense" else self.rule.ranking

    def lifetime(self, position: Tensor, pinned: Tensor | None = None) -> Tensor | None:
        """Queries that see each key by position alone, (batch, n); dense mode bypasses the rule, never the model's own
        sliding window. pinned: keys that no rule drops."""
        rule = Rule() if self.mode == "dense" else self.rule
        return lifetimes(position, rule, self.state.policy.sinks, self.state.policy.recent, self.window, pinned)

    def inherit(self, drop_time: Tensor) -> Tensor:
        """With propagate_in_depth, a key gone in the layer above is gone here: the earlier of the two drop times."""
        if not self.state.propagate_in_depth:
            return drop_time
        if self.layer_idx > 0:
            drop_time = torch.minimum(drop_time, self.state.inherited[self.layer_idx - 1])
        self.state.inherited[self.layer_idx] = drop_time
        return drop_time


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    pruning: Soft | Hard | Attends | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The attention function transformers calls: query (batch, heads, n, width) -> (batch, n, heads, width).

    Beside the output it returns, for Soft, the sum of I per row, which the wrapper takes off again. UserError for masks
    that are more than padding, and for what would be added to the logits: drop times know neither.
    """
    _refuse_mask(attention_mask)
    for name in ADDED:
        if kwargs.get(name) is not None:
            raise UserError(f"{type(module).__name__} gives its attention {name}: this model cannot be pruned")
    if pruning is None:
        return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling, **kwargs)
    if dropout:
        raise UserError(
            "attention dropout does not go with pruning: load the model with its attention dropout set to 0"
        )
    if not isinstance(pruning, Soft | Hard):
        return pruning.attend(query, key, value, _scale(query, scaling)).transpose(1, 2).contiguous(), None
    if isinstance(pruning, Hard):
        output = kernels.drop_time_attention(query, key, value, pruning.drop_time, scale=scaling)
        return output.transpose(1, 2).contiguous(), None
    if pruning.state.propagate_in_depth:
        output, alive = _soft_in_depth(module, query, key, value, pruning, scaling)
    else:
        gates = (pruning.interaction_query, pruning.interaction_key, pruning.beta, pruning.alpha)
        output, alive = kernels.pruned_attention(
            query, key, value, *gates, guard=pruning.guard, end=pruning.end, scale=scaling
        )
    return output.transpose(1, 2).contiguous(), alive


def _refuse_mask(mask: Tensor | None) -> None:
    if mask is not None and mask.ndim > 2:
        raise UserError("attention masks of one's own are not read: give one for padding, (batch, keys)")


def _scale(query: Tensor, given: float | None) -> float:
    return query.shape[-1] ** -0.5 if given is None else given


def _soft_in_depth(module, query, key, value, call: Soft, scaling) -> tuple[Tensor, Tensor]:
    """log I summed over the layers so far: n x n state by nature, so the plain formulation is used."""
    state = call.state
    gates = (call.interaction_query, call.interaction_key, call.beta, call.alpha)
    log_alive = kernels.log_survival(*gates, guard=call.guard, end=call.end)
    if module.layer_idx > 0:
        log_alive = log_alive + state.inherited[module.layer_idx - 1]
    state.inherited[module.layer_idx] = log_alive
    n = log_alive.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()
    bias = log_alive.masked_fill(~causal, -torch.inf)
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    weights = torch.softmax(query @ key.transpose(2, 3) * scaling + bias[:, None].to(query.dtype), dim=-1)
    return weights @ value, torch.exp(log_alive).tril(-1).sum((1, 2))


def padding_only(batch_size: int, q_length: int, kv_length: int, *args, attention_mask: Tensor | None = None, **kwargs):
    """The mask transformers prepares for us: just the (batch, keys) padding mask; causality lies in the drop times."""
    return attention_mask


def register() -> None:
    """Make `attn_implementation="ctxprune"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_only)
