"""What is the article about? Topics of news (AG's corpus, arXiv 1509.01626), lines of text, tab, topic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ctxprune.tasks.examples import Example, labelled
from ctxprune.tasks.prompted import FileTask


@dataclass(frozen=True)
class AgNewsConfig(FileTask):
    """News and one of four topics; a decoder says the topic."""

    name: ClassVar[str] = "agnews"
    labels: ClassVar[tuple[str, ...]] = ("World", "Sports", "Business", "Sci/Tech")

    def examples(self, file: str) -> Iterator[Example]:
        return labelled(file, "text", self.labels)

    def questions(self, example: Example) -> Iterator[tuple[str, str]]:
        yield "\nTopic:", " " + example.label
