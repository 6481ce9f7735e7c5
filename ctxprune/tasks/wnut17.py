"""Which words are names, and of what? Emerging entities (WNUT 2017), CoNLL lines of word, tab, tag."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ctxprune.tasks.examples import Example, column_of_words
from ctxprune.tasks.prompted import FileTask

_KINDS = ("corporation", "creative-work", "group", "location", "person", "product")


@dataclass(frozen=True)
class Wnut17Config(FileTask):
    """Words and their tags, O, B-kind or I-kind; a decoder is shown each word again and says its tag."""

    name: ClassVar[str] = "wnut17"
    labels: ClassVar[tuple[str, ...]] = ("O", *(f"{part}-{kind}" for kind in _KINDS for part in "BI"))

    def examples(self, file: str) -> Iterator[Example]:
        return column_of_words(file, self.labels)

    def questions(self, example: Example) -> Iterator[tuple[str, str]]:
        for number, (word, tag) in enumerate(zip(example.words, example.tags, strict=True)):
            yield ("\nTags:" if not number else "") + f"\n{word} =", " " + tag
