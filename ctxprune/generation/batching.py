"""How do many requests share one model and one pool of memory? By continuous batching: a request joins the running
batch as soon as there is room, and leaves it at its own end.

Every step feeds one token of each running row. New requests are read first, their prompts in chunks and in a cache of
their own, and then join; rows that end give their pages back. When the pool is full the youngest request waits: what it
had written becomes part of its prompt, so nothing is lost and nothing is written twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune.cache.page_pool import PoolFull
from ctxprune.cache.pinning import stacked
from ctxprune.cache.pruned_cache import SHRINK_EVERY, PrunedCache
from ctxprune.cache.revival import Alarm
from ctxprune.errors import UserError
from ctxprune.generation.admission import Expectation
from ctxprune.generation.captured import StepRunner
from ctxprune.generation.prefill import prefill
from ctxprune.generation.prompts import check_prompt
from ctxprune.generation.request import EndOfText, Request, ends_of, tell
from ctxprune.generation.sampling import Sampling, pick
from ctxprune.retrofitting import mode, state_of

SIMILAR = 1.25
"""Prompts are read together while the longest is at most this many times the shortest: padding costs time too."""


class Batcher:
    """Serves requests of one retrofitted model. Submit them at any time; `step` or `run` makes them go on."""

    def __init__(
        self,
        model,
        *,
        max_batch: int = 64,
        max_cache_bytes: int | None = None,
        max_live_tokens: int | None = None,
        prefill_chunk: int = 512,
        page: int = 64,
        alarm: Alarm | None = None,
    ):
        """max_batch: rows that run at once; max_cache_bytes: of all pages of keys, values and interaction keys;
        max_live_tokens: keys per row and layer; prefill_chunk: prompt tokens per pass, 0 for whole prompts; alarm:
        bring dropped keys back where a query may need them.

        Raises UserError for settings out of range, and a pool that no sequence fits in.
        """
        for name, value in {"max_batch": max_batch, "max_cache_bytes": max_cache_bytes}.items():
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: give at least 1")
        if prefill_chunk < 0:
            raise UserError(f"prefill_chunk is {prefill_chunk}: give 0 (whole prompts) or a positive number")
        self.model, self.dense = model, state_of(model).mode == "dense"
        self.max_batch, self.max_cache_bytes, self.prefill_chunk = max_batch, max_cache_bytes, prefill_chunk
        self.page, self.max_live_tokens, self.alarm = page, max_live_tokens, alarm
        self.expectation = Expectation(model, page, prefill_chunk)
        least = self.expectation.whole(1)
        if max_cache_bytes is not None and max_cache_bytes < least:
            raise UserError(f"max_cache_bytes is {max_cache_bytes}: one sequence takes at least {least}, give more")
        self.cache = self._new_cache()
        self.runner = StepRunner(model, self.cache)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In the order of the cache's rows."""
        self.logits: Tensor | None = None
        """(rows, vocab): what each running row's next token is picked from."""
        self.last = torch.empty(0, dtype=torch.long)
        """(rows,) the last token of each running row."""
        self.unread: list[Tensor] = []
        """Those of the last steps that nobody has asked the device for: asking waits."""
        self.submitted = self.steps = self.peak_cache_bytes = self.most_running = 0
        self.ended: list[Request] = []
        """Who has come to an end since the last step was over."""

    def submit(
        self,
        prompt: Int[Tensor, " n"],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        eos_token_id: EndOfText = None,
        pinned: Tensor | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Request:
        """A request joins the queue. on_token(index, token) is called for each of its tokens as it is written.

        Raises UserError for a prompt or settings that the model cannot serve.
        """
        check_prompt(self.model, prompt, max_new_tokens)
        whole = self.expectation.whole(len(prompt) + max_new_tokens)
        if self.dense and self.max_cache_bytes is not None and whole > self.max_cache_bytes:
            raise UserError(f"max_cache_bytes is {self.max_cache_bytes}: this request needs {whole}, give more")
        how = sampling or Sampling()
        device = next(self.model.parameters()).device
        generator = torch.Generator(device=device).manual_seed(how.seed)
        ids = prompt.detach().cpu().long()
        one = Request(self.submitted, ids, max_new_tokens, how, generator, ends_of(eos_token_id), pinned, on_token)
        self.submitted += 1
        self.waiting.append(one)
        return one

    def run(self) -> None:
        """Until nothing is left to do."""
        with self._deciding():
            while self.waiting or self.running:
                self._step()

    def step(self) -> list[Request]:
        """Admit who fits, then one token for every running row; returns those that ended."""
        with self._deciding():
            return self._step()

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        """The model as it decides when it writes: in eval mode, under the step function or dense."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), mode(self.model, "dense" if self.dense else "hard"):
                self.runner.look_at_the_model()
                yield
        finally:
            self.model.train(was_training)
            self._hear()

    def _step(self) -> list[Request]:
        self._admit()
        try:
            self._write()
            if self.running:
                self._make_room()
                self._feed()
        except BaseException:  # whatever went wrong, nobody is lost and nothing is written twice
            self._put_back()
            raise
        self.steps += 1
        ended, self.ended = self.ended, []
        return ended

    def _put_back(self) -> None:
        """Running rows wait again, in their order, and will be read anew: what they have written stays true, what the
        cache holds may not."""
        self._hear()
        self.ended += [one for one in self.running if one.finished]
        self.waiting.extendleft(reversed([one for one in self.running if not one.finished]))
        self._keep([])

    def _new_cache(self, max_bytes: int | None = None, *, reading: bool = False) -> PrunedCache:
        most = self.max_cache_bytes if max_bytes is None else max_bytes
        # Each cache has an alarm of its own; the one that was given is that of the running batch.
        alarm = self.alarm if self.alarm is None or not reading else replace(self.alarm, cold=[])
        return PrunedCache(page=self.page, max_live_tokens=self.max_live_tokens, max_bytes=most, alarm=alarm)

    # Reading prompts.
    def _admit(self) -> None:
        """Read waiting prompts, oldest first, while rows and memory last."""
        while self.waiting and len(self.running) < self.max_batch:
            group = self._next_group()
            if not group or not self._read(group):
                return

    def _next_group(self) -> list[Request]:
        """Who is read together next: neighbours in the queue, of similar length, as far as there is room for all."""
        group: list[Request] = []
        room = self._room()
        while self.waiting and len(self.running) + len(group) < self.max_batch:
            one = self.waiting[0]
            lengths = [len(one.text()), *(len(other.text()) for other in group)]
            if max(lengths) > SIMILAR * min(lengths):
                break
            room -= self.expectation.of(one)
            if room < 0 and (self.running or group):
                break
            group.append(self.waiting.popleft())
        return group

    def _room(self) -> float:
        if self.max_cache_bytes is None:
            return float("inf")
        return self.max_cache_bytes - self.cache.used_bytes()

    def _read(self, group: list[Request]) -> bool:
        """Read their prompts in a cache of their own and let them join; if the pool is full, False: they wait on."""
        self.cache.trim()
        left = None if self.max_cache_bytes is None else self.max_cache_bytes - self.cache.allocated_bytes()
        cache = self._new_cache(left, reading=True)
        cache.pinned = stacked([one.pinned for one in group])
        if self.dense and self.max_cache_bytes is None:
            cache.expected = torch.tensor([one.whole(least=cache.page) for one in group])
        try:
            # What a request had written before it had to wait is not part of its prompt.
            ends = [len(one.prompt) for one in group]
            logits = prefill(self.model, cache, [one.text() for one in group], self.prefill_chunk, ends)
        except UserError:  # one of them cannot be served, and is told so alone
            if len(group) == 1:
                raise
            self.waiting.extendleft(reversed(group))
            return self._read([self.waiting.popleft()])
        except PoolFull:
            self.expectation.was_too_low()
            self.waiting.extendleft(reversed(group))
            if len(group) > 1:
                return self._read([self.waiting.popleft() for _ in range(len(group) // 2)])
            if self.running:
                return False
            self.waiting.popleft()
            raise UserError(
                f"max_cache_bytes is {self.max_cache_bytes}: too small for the request of {len(group[0].text())} "
                "tokens, give more"
            ) from None
        except BaseException:  # whatever went wrong, nobody is lost
            self.waiting.extendleft(reversed(group))
            raise
        cache.shrink(0.0)
        self.expectation.learn(cache.allocated_bytes(), group)
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache.held_bytes() + cache.peak_bytes)
        self._hear()
        try:
            self.cache.absorb(cache)
        except BaseException:  # half of it may have happened
            self.waiting.extendleft(reversed(group))
            self._put_back()
            raise
        self.running += group
        self.most_running = max(self.most_running, len(self.running))
        self.logits = logits if self.logits is None else torch.cat([self.logits, logits])
        return True

    # Writing.
    def _write(self) -> None:
        """Every running row takes its next token; those that end leave."""
        if not self.running or self.logits is None:
            return
        self.last = pick(self.logits, [one.sampling for one in self.running], [one.generator for one in self.running])
        self.unread.append(self.last)
        if not any(one.is_awaited(len(self.unread)) for one in self.running):
            return
        self._hear()
        if any(one.finished for one in self.running):
            for one, count in zip(self.running, self.cache.live_tokens().double().mean(0).tolist(), strict=True):
                one.live_tokens = count
            self.ended += [one for one in self.running if one.finished]
            self._keep([row for row, one in enumerate(self.running) if not one.finished])

    def _hear(self) -> None:
        """Every running row takes the tokens that were picked for it; then who listens is told."""
        picked, self.unread = torch.stack(self.unread, 1).tolist() if self.unread else [], []
        taken = [(one, token) for one, tokens in zip(self.running, picked, strict=False) for token in tokens]
        for one, token in taken:
            one.take(token)
        tell(taken)

    def _keep(self, rows: list[int]) -> None:
        """Only these rows go on."""
        self._hear()
        self.running = [self.running[row] for row in rows]
        if not rows:
            self.cache, self.logits = self._new_cache(), None
            self.runner.follow(self.cache)
            return
        assert self.logits is not None
        kept = torch.tensor(rows, device=self.logits.device)
        for layer in self.cache.held:
            layer.reserved = 0  # what stays free of what was taken for rows that leave may go
        self.cache.select(kept)
        self.logits, self.last = self.logits[kept], self.last[kept]

    def _make_room(self) -> None:
        """The next token of every row has its slot, or the youngest rows wait until it has."""
        while not self.cache.make_room():
            if len(self.running) == 1:
                one = self.running[0]
                self._keep([])  # what it has written stays true, and others may come
                raise UserError(
                    f"max_cache_bytes is {self.max_cache_bytes}: too small for a sequence of {len(one.text())} tokens, "
                    "give more"
                )
            youngest = max(range(len(self.running)), key=lambda row: self.running[row].index)
            one = self.running[youngest]
            one.pauses += 1
            self.waiting.appendleft(one)
            self._keep([row for row in range(len(self.running)) if row != youngest])

    def _feed(self) -> None:
        """Each row's last token goes through the model."""
        self.logits = self.runner(self.last)
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache.peak_bytes)
        if self.steps % SHRINK_EVERY == SHRINK_EVERY - 1:
            self.cache.shrink()
