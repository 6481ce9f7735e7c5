"""Who is read next, and how much memory will that take? Judged by what requests before kept."""

from __future__ import annotations

from collections import deque
from itertools import islice

from ctxprune.generation.prompts import page_bytes
from ctxprune.generation.request import Request
from ctxprune.retrofitting import state_of

SIMILAR = 1.25
"""Prompts are read together while the longest is at most this many times the shortest: padding costs time too."""


class Expectation:
    """Bytes that requests of one model take, of which some share of each prompt survives."""

    def __init__(self, model, page: int, prefill_chunk: int):
        self.page, self.chunk = page, prefill_chunk
        self.layers, self.page_bytes = state_of(model).layers, page_bytes(model, page)
        self.kept: float | None = None
        """Bytes per prompt token that requests kept lately, over those of a prompt of which nothing is dropped; None:
        nothing is known yet, and nothing is expected to be dropped."""

    def pages(self, count: float) -> float:
        """So many pages in every layer."""
        return count * self.page_bytes * self.layers

    def whole(self, tokens: int) -> int:
        """If nothing is dropped."""
        return int(self.pages(-(-tokens // self.page)))

    def of(self, one: Request) -> float:
        """While it is read: what of it probably stays, and a chunk in the layer that is reading it, before what that
        drops is gone."""
        length = len(one.text())
        stays = self.pages(((self.kept or 1.0) * length + self.page / 2) / self.page)
        return stays + self.page_bytes * (min(length, self.chunk or length) / self.page + 1)

    def learn(self, held: int, group: list[Request]) -> None:
        """These prompts, once read, hold so many bytes."""
        share = held / self.pages(sum(len(one.text()) for one in group) / self.page)
        self.kept = min(1.0, share if self.kept is None else 0.5 * self.kept + 0.5 * share)

    def was_too_low(self) -> None:
        """There was no room after all."""
        self.kept = min(1.0, 1.5 * (self.kept or 1.0))


def next_group(
    waiting: deque[Request], expectation: Expectation, places: int, room: float, *, alone: bool
) -> list[Request]:
    """Who leaves the queue to be read together: neighbours, of similar length, as far as there are places and bytes
    for all. alone: nobody runs, and the first is read however much it takes."""
    group: list[Request] = []
    for one in islice(waiting, places):
        lengths = [len(one.text()), *(len(other.text()) for other in group)]
        if max(lengths) > SIMILAR * min(lengths):
            break
        room -= expectation.of(one)
        if room < 0 and (group or not alone):
            break
        group.append(one)
    for _ in group:
        waiting.popleft()
    return group
