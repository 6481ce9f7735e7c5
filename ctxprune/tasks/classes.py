"""Which label does the text have? A person's own labels: lines of text, tab, label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

from ctxprune.errors import UserError
from ctxprune.tasks.examples import Example, changed, table
from ctxprune.tasks.prompted import FileTask
from ctxprune.text.files import named


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
    """Read once for each state of the file. A label of a single text is taken for a slip, or for a title line."""
    count = Counter(example.label for example in table(file, None))
    for label, texts in count.items():
        if texts == 1:
            raise UserError(
                f"{named(Path(file))}: one text alone has the label {label!r}: mend it, or give more of them"
            )
    return tuple(sorted(count))
