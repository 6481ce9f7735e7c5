"""What does a layer ask of its policy? A learned gate, how long a key lives by its position, or how keys are ranked."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor, nn

from ctxprune.gate import InteractionGate
from ctxprune.policies.budget import Budget
from ctxprune.policies.scorer import Scorer

FOREVER = 1 << 30
"""A lifetime or drop time no sequence reaches; sums of two still fit in 32 bits."""


@runtime_checkable
class RankingConfig(Protocol):
    """What a policy that ranks says of every layer; see ctxprune.policies.ranked.RankedConfig."""

    @property
    def budget(self) -> Budget: ...
    @property
    def when(self) -> str: ...
    @property
    def apart(self) -> bool: ...
    @property
    def keep_prompt(self) -> bool: ...
    @property
    def sinks(self) -> int: ...
    @property
    def recent(self) -> int: ...


class Ranking(nn.Module):
    """One layer's scorer, and what its policy makes of the scores."""

    def __init__(self, scorer: Scorer, config: RankingConfig, layer: int, layers: int):
        super().__init__()
        self.scorer, self.config, self.layer, self.layers = scorer, config, layer, layers

    @property
    def on_arrival(self) -> bool:
        """Whether a key's fate is decided when it comes, whatever comes later."""
        return self.config.when == "step" and not self.config.budget.counted

    @property
    def marks(self) -> bool:
        """Whether two numbers must be kept beside each key: not where it is never asked about again."""
        return self.scorer.marks and not self.on_arrival


class Rule(nn.Module):
    """One layer's rule; as it stands it drops nothing.

    gate: the learned gate that later queries drop keys by, or None. ranking: how keys are ranked against each other, or
    None.
    """

    gate: InteractionGate | None
    ranking: Ranking | None

    def __init__(self, gate: InteractionGate | None = None, ranking: Ranking | None = None):
        super().__init__()
        self.gate, self.ranking = gate, ranking

    def lifetime(self, position: Int[Tensor, "batch n"]) -> Int[Tensor, "batch n"] | None:
        """How many queries see a key by its position alone, itself included; None: for ever."""
        return None
