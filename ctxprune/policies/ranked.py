"""What do all policies that rank keys share? A budget, when it is enforced, and whether heads decide apart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from ctxprune.errors import UserError
from ctxprune.policies.budget import Budget
from ctxprune.policies.rule import Ranking, Rule
from ctxprune.policies.scorer import Scorer


@dataclass(frozen=True)
class RankedConfig(ABC):
    """Base of the policies that are a score: a subclass names itself and says how a layer's scorer is made."""

    policy: ClassVar[str]
    budget: Budget = field(default_factory=lambda: Budget(share=0.5))
    """How many keys stay."""
    when: str = "prompt"
    """prompt: once, at the end of the prompt, and what is written after it stays; step: before every token, so that the
    budget is never exceeded (or, with a threshold, when a key comes: it goes once `recent` later tokens are there)."""
    apart: bool = False
    """Whether each KV head decides for itself; otherwise a token stays or goes for all heads of a layer."""
    keep_prompt: bool = False
    """Drop only what was written after the prompt (when=step)."""
    sinks: int = 4
    """First tokens of each document that are never dropped: without them trained models collapse (arXiv 2309.17453)."""
    recent: int = 8
    """Most recent tokens that are never dropped."""

    def __post_init__(self):
        name, budget = self.policy, self.budget
        if not isinstance(budget, Budget):
            raise UserError(f"{name} has budget={budget!r}: give a ctxprune.policies.Budget, as Budget(share=0.25)")
        for setting in ("sinks", "recent"):
            if not isinstance(getattr(self, setting), int):
                raise UserError(f"{name} has {setting}={getattr(self, setting)!r}: give a whole number of tokens")
        if self.when not in ("prompt", "step"):
            raise UserError(f"{name} has when={self.when!r}: give prompt or step")
        if self.sinks < 0 or self.recent < 0:
            raise UserError(f"{name} has sinks={self.sinks}, recent={self.recent}: give 0 or more")
        if budget.head_floor < 1.0 and not (self.apart and self.when == "prompt"):
            raise UserError(
                f"{name}: budget head_floor is for heads that decide apart at a prompt's end: set apart=true"
            )
        if self.when == "step" and not budget.counted and (budget.mass is not None or not self.scorer(0, 1).at_once):
            raise UserError(
                f"{name}: a budget of mass, or a threshold on scores that change, is for when=prompt; give tokens or "
                "share"
            )
        if self.when == "step" and self.scorer(0, 1).whole_prompt:
            raise UserError(f"{name} ranks a whole prompt at once: give when=prompt")
        if self.keep_prompt and (self.when == "prompt" or budget.share is None):
            raise UserError(f"{name}: keep_prompt drops what is written later: give when=step and a budget of share")
        if budget.tokens is not None and budget.tokens <= self.sinks + self.recent:
            raise UserError(
                f"{name}: a budget of {budget.tokens} tokens has no room beside sinks={self.sinks} and "
                f"recent={self.recent}: give at least {self.sinks + self.recent + 1}, or protect fewer"
            )

    @abstractmethod
    def scorer(self, layer: int, width: int) -> Scorer:
        """The scorer of one layer of a model of this hidden width."""

    def rules(self, layers: int, width: int, kv_heads: int) -> list[Rule]:
        """One scorer per layer; see ctxprune.policies."""
        return [Rule(ranking=Ranking(self.scorer(layer, width), self, layer, layers)) for layer in range(layers)]
