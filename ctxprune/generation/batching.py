"""How do many requests share one model and one pool of memory? By continuous batching: a request joins the running
batch as soon as there is room, and leaves it at its own end.

Every step feeds one token of each running row. New requests are read first, their prompts in chunks and in a cache of
their own, and then join; rows that end give their pages back. When the pool is full the youngest request waits: what it
had written becomes part of its prompt, so nothing is lost and nothing is written twice.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from ctxprune.cache.page_pool import PoolFull
from ctxprune.cache.pruned_cache import SHRINK_EVERY, PrunedCache
from ctxprune.cache.revival import Alarm
from ctxprune.errors import UserError
from ctxprune.generation.admission import Expectation, next_group
from ctxprune.generation.captured import StepRunner
from ctxprune.generation.prefill import read
from ctxprune.generation.prompts import check_prompt
from ctxprune.generation.request import EndOfText, Refused, Request, ends_of, tell
from ctxprune.generation.sampling import Sampling, pick
from ctxprune.retrofitting import mode, state_of


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
        """Who has come to an end since a step last returned."""
        self.failure: BaseException | None = None
        """What a listener has raised in the step that goes on."""

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
        generator = torch.Generator(next(self.model.parameters()).device).manual_seed(how.seed)
        ids = prompt.detach().cpu().long()
        one = Request(self.submitted, ids, max_new_tokens, how, generator, ends_of(eos_token_id), pinned, on_token)
        self.submitted += 1
        self.waiting.append(one)
        return one

    def run(self) -> None:
        """Until nothing is left to do. Whatever is raised, by a listener too, a further call goes on, and no text is
        another for it."""
        with self._deciding():
            while self.waiting or self.running:
                self._step()
        self.ended = []

    def step(self) -> list[Request]:
        """Admit who fits, then one token for every running row; returns those that ended since a step last returned
        some (one that raises returns nothing). Raises as `run` does."""
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
        try:
            self._admit()
            self._write()
            if self.running:
                self._make_room()
                self._feed()
        except Refused:  # one request; the others are as they were
            raise
        except BaseException:  # whatever went wrong, nobody is lost and nothing is written twice
            self._put_back()
            raise
        self.steps += 1
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        ended, self.ended = self.ended, []
        return ended

    def _put_back(self) -> None:
        """Running rows wait again, in their order, and will be read anew: what they have written stays true, what the
        cache holds may not."""
        try:
            self._hear()
        finally:
            self.ended += [one for one in self.running if one.finished]
            self.waiting.extendleft(reversed([one for one in self.running if not one.finished]))
            self.unread = []
            self._keep([])

    def _new_cache(self, max_bytes: int | None = None, *, reading: bool = False) -> PrunedCache:
        most = self.max_cache_bytes if max_bytes is None else max_bytes
        # Each cache has an alarm of its own; the one that was given is that of the running batch.
        alarm = self.alarm if self.alarm is None or not reading else replace(self.alarm, cold=[])
        return PrunedCache(page=self.page, max_live_tokens=self.max_live_tokens, max_bytes=most, alarm=alarm)

    # Reading prompts.
    def _admit(self) -> None:
        """Read waiting prompts, oldest first, while rows and memory last."""
        while self.waiting and (places := self.max_batch - len(self.running)) > 0:
            room = math.inf if self.max_cache_bytes is None else self.max_cache_bytes - self.cache.used_bytes()
            group = next_group(self.waiting, self.expectation, places, room, alone=not self.running)
            if not group or not self._read(group):
                return

    def _read(self, group: list[Request]) -> bool:
        """Read their prompts in a cache of their own and let them join; if the pool is full, False: they wait on."""
        try:
            cache, logits = self._prefilled(group)
        except UserError as error:  # one of them cannot be served, and is told so alone
            if len(group) == 1:
                raise Refused(str(error)) from error
            fewer = 1
        except PoolFull:
            self.expectation.was_too_low()
            if len(group) == 1 and not self.running:
                raise Refused(self._too_small("the request", group[0])) from None
            fewer = len(group) // 2
        except BaseException:  # whatever went wrong, nobody is lost
            self.waiting.extendleft(reversed(group))
            raise
        else:
            self._join(cache, logits, group)
            return True
        self.waiting.extendleft(reversed(group))
        return fewer > 0 and self._read([self.waiting.popleft() for _ in range(fewer)])

    def _join(self, cache: PrunedCache, logits: Tensor, group: list[Request]) -> None:
        """Who has been read runs."""
        try:
            self._hear()
            logits = logits if self.logits is None else torch.cat([self.logits, logits])
            self.cache.absorb(cache)
            self.running, self.logits = [*self.running, *group], logits
        except BaseException:  # half of it may have happened
            self.waiting.extendleft(reversed([one for one in group if one not in self.running]))
            raise
        self.most_running = max(self.most_running, len(self.running))

    def _prefilled(self, group: list[Request]) -> tuple[PrunedCache, Tensor]:
        """A cache of their own that has read them, and the logits after each."""
        self.cache.trim()
        left = None if self.max_cache_bytes is None else self.max_cache_bytes - self.cache.allocated_bytes()
        cache = self._new_cache(left, reading=True)
        if self.dense and self.max_cache_bytes is None:
            cache.expected = torch.tensor([one.whole(least=cache.page) for one in group])
        try:
            logits = read(self.model, cache, group, self.prefill_chunk)
            cache.shrink(0.0)
        except BaseException:
            cache.reset()  # now: it is a cycle, and others are read next
            raise
        finally:
            self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache.held_bytes() + cache.peak_bytes)
        self.expectation.learn(cache.allocated_bytes(), group)
        return cache, logits

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
        if not self.unread:
            return
        picked = torch.stack(self.unread, 1).tolist()
        self.unread = []
        taken = [(one, token) for one, tokens in zip(self.running, picked, strict=True) for token in tokens]
        for one, token in taken:
            one.take(token)
        self.failure = self.failure or tell(taken)

    def _keep(self, rows: list[int]) -> None:
        """Only these rows go on."""
        self._hear()
        self.running = [self.running[row] for row in rows]
        if not rows:
            self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache.peak_bytes)
            self.cache.reset()  # now: caches and what layers know of them are cycles
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
                raise UserError(self._too_small("a sequence", one))
            youngest = max(range(len(self.running)), key=lambda row: self.running[row].index)
            one = self.running[youngest]
            self._hear()  # a text in the queue is whole
            one.pauses += 1
            self.waiting.appendleft(one)
            self._keep([row for row in range(len(self.running)) if row != youngest])

    def _too_small(self, what: str, one: Request) -> str:
        return f"max_cache_bytes is {self.max_cache_bytes}: too small for {what} of {len(one.text())} tokens, give more"

    def _feed(self) -> None:
        """Each row's last token goes through the model."""
        self.logits = self.runner(self.last)
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache.peak_bytes)
        if self.steps % SHRINK_EVERY == SHRINK_EVERY - 1:
            self.cache.shrink()
