"""How does a pruned model write exactly what it would write dense? It drafts for its own dense self.

The pruned cache drafts a few tokens, one dense pass over the full cache verifies them all (speculative decoding, arXiv
2211.17192 and 2302.01318; pruned caches as drafts: arXiv 2408.11049). Accepted drafts are what dense decoding would
have written, in distribution, and token by token when greedy. Refused ones are taken back from both caches: keys,
positions, and what they had dropped. How many drafts are accepted is an honest measure of what pruning costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctxprune.cache.pruned_cache import PrunedCache
from ctxprune.errors import UserError
from ctxprune.generation.prefill import prefill
from ctxprune.generation.prompts import check_prompt
from ctxprune.generation.request import EndOfText, ends_of
from ctxprune.generation.sampling import RowDraws, Sampling, probabilities
from ctxprune.generation.speculation import DraftLength
from ctxprune.retrofitting import mode, state_of


@dataclass(frozen=True)
class LosslessGeneration:
    """tokens: the new tokens of each prompt; drafted, accepted: tokens, over all rows; passes: dense passes that
    verified; steps: pruned steps that drafted; expected_speedup: over dense decoding by the bytes both move, at the
    acceptance found (below 1 this mode loses: the cache does not outweigh the weights, or drafts are refused);
    cache_bytes, draft_cache_bytes: what was alive in the full cache and in the drafting one when writing began."""

    tokens: list[Int[Tensor, " _"]]
    drafted: int
    accepted: int
    passes: int
    steps: int
    expected_speedup: float
    cache_bytes: int = 0
    draft_cache_bytes: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that dense decoding would have written; NaN when none was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")


class Draws(Protocol):
    """Where the rows' randomness comes from: ctxprune.generation.sampling.RowDraws."""

    def uniform(self, count: int) -> Float[Tensor, "rows count"]:
        """So many numbers in [0, 1) for each row."""

    def pick(self, probability: Float[Tensor, "rows vocab"]) -> Int[Tensor, " rows"]:
        """A token for each row, by these probabilities, which need not sum to 1."""


def settle(
    drafts: Int[Tensor, "rows drafts"],
    proposed: Float[Tensor, "rows drafts vocab"],
    exact: Float[Tensor, "rows more vocab"],
    draws: Draws,
) -> list[list[int]]:
    """What is written of each row's drafts: those accepted, and one token more.

    proposed: what each draft was drawn from; exact: what dense decoding draws from at each of these places and after.
    A draft d is accepted with probability min(1, exact(d) / proposed(d)); instead of the first one refused comes a
    token drawn from max(exact - proposed, 0), normalised (arXiv 2211.17192, theorem 1: the result is distributed as
    exact). If all are accepted the next one is drawn from exact itself.
    """
    rows, many = torch.arange(len(drafts), device=drafts.device), drafts.shape[1]
    q, p = (of.gather(2, drafts[:, :, None])[:, :, 0] for of in (proposed, exact[:, :many]))
    count = (draws.uniform(many) * q < p).long().cumprod(1).sum(1)
    last = exact[rows, count]
    if many:
        left = (last - proposed[rows, count.clamp(max=many - 1)]).clamp(min=0)
        # Rounding may leave nothing where both are the same: then dense draws from exact.
        refused = (count < many) & (left.sum(-1) > 0)
        last = torch.where(refused[:, None], left, last)
    written = torch.cat([drafts, drafts.new_zeros(len(drafts), 1)], 1).scatter(
        1, count[:, None], draws.pick(last)[:, None]
    )
    return [row[: most + 1] for row, most in zip(written.tolist(), count.tolist(), strict=True)]


def settle_greedy(drafts: Int[Tensor, "rows drafts"], choices: Int[Tensor, "rows more"]) -> list[list[int]]:
    """The same of greedy rows, all at once: a draft is accepted where dense decoding chooses it too, so that what is
    written are dense decoding's choices up to the first that differs."""
    agreed = (drafts == choices[:, :-1]).long().cumprod(1).sum(1).tolist()
    return [row[: count + 1] for row, count in zip(choices.tolist(), agreed, strict=True)]


@dataclass(eq=False)
class _Row:
    """One prompt in flight. pending: its last tokens, which the drafting cache has not seen yet."""

    index: int
    pending: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def last(self) -> int:
        """The token that neither cache has seen."""
        return self.tokens[-1]


@torch.inference_mode()
def generate_lossless(
    model,
    input_ids: Int[Tensor, "batch n"] | list[Int[Tensor, " _"]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: EndOfText = None,
    draft: int | None = None,
    prefill_chunk: int = 512,
    on_token: Callable[[int, int], None] | None = None,
) -> LosslessGeneration:
    """Continue prompts exactly as the dense model would, with the pruned one drafting. Arguments as ctxprune.generate.

    draft: tokens per round, or None: as many as pay at the acceptance so far. It keeps the full cache beside the pruned
    one, so it saves time and never memory. Greedy text is that of dense decoding; sampled text is distributed as it,
    but which sample a seed gives depends on the drafts.

    Raises UserError as ctxprune.generate does, and for draft < 1.
    """
    how = Sampling(temperature, top_k, top_p, seed)
    if draft is not None and draft < 1:
        raise UserError(f"draft is {draft}: give at least 1, or None to let it adapt")
    prompts = [row for row in input_ids]
    if not prompts:
        raise UserError("the prompt is empty: give at least one token")
    for prompt in prompts:
        check_prompt(model, prompt, max_new_tokens)
    if state_of(model).mode == "dense":
        raise UserError("this model is in dense mode, and has nothing that could draft: leave ctxprune.mode")
    was_training, ends = model.training, ends_of(eos_token_id)
    model.eval()
    try:
        session = _Session(model, prompts, how, prefill_chunk, DraftLength(model, draft), max_new_tokens)
        while session.rows:
            session.write(max_new_tokens, ends, on_token)
    finally:
        model.train(was_training)
    return session.result()


class _Session:
    """The two caches, and the rows that are not finished."""

    def __init__(self, model, prompts: list[Tensor], how: Sampling, chunk: int, length: DraftLength, most: int):
        self.model, self.how, self.length, self.greedy = model, how, length, how.temperature == 0
        device = next(model.parameters()).device
        self.full, self.pruned = PrunedCache(), PrunedCache()
        # Rows leave one by one, and each would have the pool copied.
        self.full.expected = torch.tensor([len(prompt) + most for prompt in prompts])
        with mode(model, "dense"):
            logits = prefill(model, self.full, prompts, chunk)
        with mode(model, "hard"):
            prefill(model, self.pruned, prompts, chunk)
        # The prompt is final; what comes now may be taken back.
        self.full.reversible = self.pruned.reversible = True
        for layer in self.pruned.held:
            layer.reserve(layer.in_use + len(prompts))
        self.rows = [_Row(row) for row in range(len(prompts))]
        self.draws = RowDraws((how.seed + row for row in range(len(prompts))), device)
        self.finished: dict[int, list[int]] = {}
        self.passes = self.steps = 0
        self.first: Tensor | None = logits
        self.began_with = self.full.live_bytes(), self.pruned.live_bytes()

    def write(self, most: int, ends: frozenset[int], on_token: Callable[[int, int], None] | None) -> None:
        """One round: drafts, one dense pass, and what comes of it in every row."""
        if self.first is not None:
            chosen, self.first = self._drawn(self._proposed(self.first)), None
            written = chosen[:, None].tolist()
            for row, tokens in zip(self.rows, written, strict=True):
                row.pending = list(tokens)
        else:
            written = self._round(most)
        for row, tokens in zip(self.rows, written, strict=True):
            for token in tokens[: most - len(row.tokens)]:
                row.tokens.append(token)
                if on_token is not None:
                    on_token(row.index, token)
                if token in ends:
                    break
        going = [at for at, row in enumerate(self.rows) if len(row.tokens) < most and row.last not in ends]
        if len(going) < len(self.rows):
            self.finished |= {row.index: row.tokens for place, row in enumerate(self.rows) if place not in going}
            self.rows = [self.rows[place] for place in going]
            self.draws.select(going)
            for cache in (self.full, self.pruned):
                if going:
                    cache.select(torch.tensor(going))

    def _round(self, most: int) -> list[list[int]]:
        """What each row writes of this round's drafts."""
        before = self.full.lengths.clone()
        count = min(self.length.best(self.full, self.pruned), self._useful(most, int(before.max())))
        drafts, proposed = self._draft(count)
        last = torch.tensor([row.last for row in self.rows], device=drafts.device)
        with mode(self.model, "dense"):
            exact = self._proposed(self._feed(self.full, torch.cat([last[:, None], drafts], 1)))
        self.passes += 1
        if proposed is None:
            written = settle_greedy(drafts, exact)
        else:
            written = settle(drafts, proposed, exact, self.draws)
        for tokens in written:
            self.length.learn(count, len(tokens) - 1)
        accepted = torch.tensor([len(tokens) - 1 for tokens in written], device=before.device)
        self.full.rewind(before + 1 + accepted)
        # The drafting cache never saw the last draft: where all were accepted it is still to come.
        for place, row in enumerate(self.rows):
            final = [*row.pending, *written[place][:-1]]
            seen = min(len(final), len(row.pending) + count - 1) if count else 0
            row.pending = [*final[seen:], written[place][-1]]
        self.pruned.rewind(torch.minimum(before + 1 + accepted, self.pruned.lengths))
        return written

    def _useful(self, most: int, longest: int) -> int:
        """Drafts that some row can still use, and that have a position in every row: one that is nearly done must not
        hold up the others, and what it is given beyond its end is forgotten with it."""
        useful = most - min(len(row.tokens) for row in self.rows) - 1
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return useful if positions is None else max(0, min(useful, positions - longest - 1))

    def _draft(self, count: int) -> tuple[Int[Tensor, "rows count"], Tensor | None]:
        """`count` drafts per row and, unless greedy, what they were drawn from, (rows, count, vocab)."""
        drafts: list[Tensor] = []
        proposed: list[Tensor] = []
        for step in range(count):
            with mode(self.model, "hard"):
                logits = self._feed(self.pruned, *self._pending() if step == 0 else (drafts[-1][:, None],))
            self.steps += 1
            proposed.append(self._proposed(logits[:, -1]))
            drafts.append(self._drawn(proposed[-1]))
        device = self.full.lengths.device
        made = torch.stack(drafts, 1) if drafts else torch.zeros(len(self.rows), 0, dtype=torch.long, device=device)
        if self.greedy:
            return made, None
        nothing = torch.zeros(len(self.rows), 0, self.model.config.vocab_size, device=device)
        return made, torch.stack(proposed, 1) if proposed else nothing

    def _proposed(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from: probabilities (..., vocab); greedy, the likeliest tokens (...)."""
        return logits.argmax(-1) if self.greedy else probabilities(logits, self.how)

    def _drawn(self, proposed: Tensor) -> Int[Tensor, " rows"]:
        """One token per row."""
        return proposed if self.greedy else self.draws.pick(proposed)

    def _pending(self) -> tuple[Tensor, Tensor | None]:
        """What the drafting cache has not seen, padded on the left, and where it is real."""
        most = max(len(row.pending) for row in self.rows)
        missing = [most - len(row.pending) for row in self.rows]
        ids = torch.tensor([[0] * n + row.pending for n, row in zip(missing, self.rows, strict=True)])
        return ids, torch.arange(most) >= torch.tensor(missing)[:, None] if any(missing) else None

    def _feed(self, cache: PrunedCache, ids: Tensor, real: Tensor | None = None) -> Float[Tensor, "rows n vocab"]:
        device = cache.lengths.device
        real = real if real is None else real.to(device)
        column = torch.arange(ids.shape[1], device=device) if real is None else (real.cumsum(1) - 1).clamp(min=0)
        position = cache.lengths[:, None] + column
        inputs = {"position_ids": position, "attention_mask": real, "past_key_values": cache, "use_cache": True}
        return self.model(ids.to(device), **inputs).logits

    def result(self) -> LosslessGeneration:
        tokens = [torch.tensor(self.finished[index]) for index in sorted(self.finished)]
        length = self.length
        return LosslessGeneration(
            tokens, length.drafted, length.accepted, self.passes, self.steps, length.expected_speedup, *self.began_with
        )
