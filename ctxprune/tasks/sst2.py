"""Is the sentence positive or negative? Film reviews (SST-2, Socher et al. 2013), lines of sentence, tab, 0 or 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ctxprune.tasks.examples import Example, labelled
from ctxprune.tasks.prompted import FileTask


@dataclass(frozen=True)
class Sst2Config(FileTask):
    """Sentences and their sentiment; a decoder says it in one word."""

    name: ClassVar[str] = "sst2"
    labels: ClassVar[tuple[str, ...]] = ("0", "1")

    def examples(self, file: str) -> Iterator[Example]:
        return labelled(file, "sentence", self.labels)

    def questions(self, example: Example) -> Iterator[tuple[str, str]]:
        yield "\nSentiment:", " positive" if example.label == "1" else " negative"
