"""Which label does the text have? A person's own labels: lines of text, tab, label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from ctxprune.tasks.examples import Example, changed, table
from ctxprune.tasks.prompted import FileTask


@dataclass(frozen=True)
class ClassesConfig(FileTask):
    """Texts and one of the labels that `file` has; a decoder says the label."""

    name: ClassVar[str] = "classes"

    @property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override] # of other tasks they are known without a file
        """Those of `file`, in alphabetical order. UserError, naming file and line, for a broken file."""
        return _labels(self.file, changed(self.file))

    def examples(self, file: str) -> Iterator[Example]:
        return table(file, self.labels)

    def questions(self, example: Example) -> Iterator[tuple[str, str]]:
        yield "\nLabel:", " " + example.label


@lru_cache(maxsize=8)
def _labels(file: str, changed: int) -> tuple[str, ...]:
    """Read once for each state of the file."""
    return tuple(sorted({example.label for example in table(file, None)}))
