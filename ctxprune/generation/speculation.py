"""How many tokens should be drafted? As many as pay, by the bytes that drafting and verifying move.

With acceptance a per token, g drafts and their verification write (1 - a^(g+1)) / (1 - a) tokens on average (arXiv
2211.17192, eq. 1), and cost g c + v steps of dense decoding. A step is bound by what it reads, so with r bytes of full
cache per byte of weights, of which the pruned cache keeps the share k, a draft costs c = (1 + k r) / (1 + r).
"""

from __future__ import annotations

from ctxprune.cache.pruned_cache import PrunedCache

VERIFYING = 1.15
"""Cost of verifying, in dense steps: it reads what one step reads and computes for a few tokens."""
TILE, TILE_ON_A_CPU = 4, 0.35
"""There tokens are computed four at a time, each four for so much of a step: 4, 8, 12 and 16 tokens of 64 rows over
1 GB took 1.26, 1.75, 2.11 and 2.45 steps, of 8 rows 1.23, 1.57, 1.87 and 2.18 (2 cores, AVX-512)."""
FIRST_GUESS = 0.8
"""Acceptance before anything was drafted."""
MEMORY = 0.9
"""Weight of what was known before, per token drafted."""
MOST = 16
"""Drafts at most."""
WEIGH_EVERY = 8
"""Rounds between two looks at what the caches hold: it grows by a few tokens a round."""


def speedup(acceptance: float, drafts: int, draft_cost: float, verifying: float = VERIFYING) -> float:
    """Over dense decoding, which writes one token per step. Both costs in dense steps."""
    written = sum(acceptance**place for place in range(drafts + 1))
    return written / (drafts * draft_cost + (verifying if drafts else 1.0))


def verifying(drafts: int, *, on_a_cpu: bool) -> float:
    """What one dense pass over these drafts and the token before them costs, in dense steps."""
    return 0.9 + TILE_ON_A_CPU * -(-(drafts + 1) // TILE) if on_a_cpu else VERIFYING


class DraftLength:
    """How many drafts this round, from what became of those before."""

    def __init__(self, model, fixed: int | None = None):
        self.fixed = fixed
        self.on_a_cpu = next(model.parameters()).device.type == "cpu"
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.acceptance, self.draft_cost = FIRST_GUESS, 1.0
        self.costs: list[float] = []
        self.drafted = self.accepted = self.refused = self.rounds = 0

    def best(self, full: PrunedCache, pruned: PrunedCache) -> int:
        """Drafts for the next round: those that are expected to pay most, at least one, so that acceptance is known."""
        if self.rounds % WEIGH_EVERY == 0:
            everything, kept = full.live_bytes(), pruned.live_bytes()
            self.draft_cost = (self.weight_bytes + kept) / (self.weight_bytes + everything)
        self.rounds += 1
        self.costs.append(self.draft_cost)
        if self.fixed is not None:
            return self.fixed
        return max(range(1, MOST + 1), key=lambda drafts: self._expected(self.acceptance, drafts, self.draft_cost))

    def _expected(self, acceptance: float, drafts: int, cost: float) -> float:
        return speedup(acceptance, drafts, cost, verifying(drafts, on_a_cpu=self.on_a_cpu))

    def learn(self, drafted: int, accepted: int) -> None:
        """So many of one row's drafts were accepted, and the next one, if there was one, refused."""
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + accepted
        self.refused += accepted < drafted
        for outcome in [1.0] * accepted + [0.0] * (accepted < drafted):
            self.acceptance = MEMORY * self.acceptance + (1 - MEMORY) * outcome

    @property
    def expected_speedup(self) -> float:
        """At the acceptance over all rounds, with as many drafts as pay most (or as many as were asked for), and by the
        median of what the caches held: rounds at the end are of few rows, whose drafts are often refused."""
        choices = range(1, MOST + 1) if self.fixed is None else [self.fixed]
        cost = sorted(self.costs)[len(self.costs) // 2] if self.costs else self.draft_cost
        judged = self.accepted + self.refused
        acceptance = self.accepted / judged if judged else self.acceptance
        return max(self._expected(acceptance, drafts, cost) for drafts in choices)
