"""What was said, in short? Dialogues and summaries (DialogSum, arXiv 2105.06762), JSON lines of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ctxprune.tasks.examples import Example, json_lines
from ctxprune.tasks.prompted import FileTask


@dataclass(frozen=True)
class DialogSumConfig(FileTask):
    """Dialogues and their summaries; each token of a summary is a question, given the right ones before it."""

    name: ClassVar[str] = "dialogsum"

    def examples(self, file: str) -> Iterator[Example]:
        return json_lines(file, "dialogue", "summary")

    def questions(self, example: Example) -> Iterator[tuple[str, str]]:
        yield "\nSummary:", " " + example.label
