"""What is asked of a Batcher, and how far is it?"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune.cache.page_pool import GROWTH
from ctxprune.errors import UserError
from ctxprune.generation.sampling import Sampling

EndOfText = int | Sequence[int] | None
"""The token, or any of several, that ends a text; None: only its length does."""


def ends_of(eos_token_id: EndOfText) -> frozenset[int]:
    """The tokens that end a text."""
    if eos_token_id is None:
        return frozenset()
    try:
        return frozenset([operator.index(eos_token_id)])  # type: ignore[arg-type]
    except TypeError:  # several; a token may be a number of numpy or torch too
        return frozenset(operator.index(one) for one in eos_token_id)  # type: ignore[union-attr]


@dataclass(eq=False)
class Request:
    """One prompt and what has been written after it."""

    index: int
    prompt: Int[Tensor, " n"]
    max_new_tokens: int
    sampling: Sampling
    generator: torch.Generator
    ends: frozenset[int] = frozenset()
    pinned: Tensor | None = None
    on_token: Callable[[int, int], None] | None = None
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    live_tokens: float = 0.0
    """Mean over layers of the keys alive at its last step, the newest included."""
    pauses: int = 0
    """How often it had to wait for others in the middle of its text."""

    def text(self) -> Int[Tensor, " n"]:
        """The prompt and all that has been written."""
        return torch.cat([self.prompt, torch.tensor(self.tokens, dtype=torch.long)])

    def whole(self, least: int) -> int:
        """Positions that it takes if nothing of it is dropped: with all that it may write, but no more than a pool that
        is full grows by, or than `least`."""
        read = len(self.prompt) + len(self.tokens)
        return min(len(self.prompt) + self.max_new_tokens, read + max(read // GROWTH, least))

    def is_awaited(self, unread: int) -> bool:
        """Whether somebody has to know its tokens now, of which that many were picked and not taken yet."""
        full = len(self.tokens) + unread >= self.max_new_tokens
        return full or bool(self.ends) or self.on_token is not None

    def take(self, token: int) -> None:
        """The next token."""
        self.tokens.append(token)
        self.finished = token in self.ends or len(self.tokens) >= self.max_new_tokens


class Refused(UserError):
    """One request cannot be served. The others are as they were."""


def tell(taken: list[tuple[Request, int]]) -> BaseException | None:
    """Call who listens to these requests, for each token that they took. Returns the first that a listener raised:
    nobody misses a token for another's sake."""
    failure: BaseException | None = None
    for one, token in taken:
        if one.on_token is not None:
            try:
                one.on_token(one.index, token)
            except BaseException as error:  # raised when the step is over, an interruption too
                failure = failure or error
    return failure
