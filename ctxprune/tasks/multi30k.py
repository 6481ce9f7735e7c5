"""How is it said in the other language? Captions and their translations (Multi30k, arXiv 1605.00459), line by line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ctxprune.errors import UserError
from ctxprune.tasks.examples import Example, parallel
from ctxprune.tasks.prompted import FileTask


@dataclass(frozen=True)
class Multi30kConfig(FileTask):
    """Two parallel files that differ in their suffix: the source `file`, and its neighbour with the suffix `target`.

    Each token of a translation is a question, given the right ones before it.
    """

    name: ClassVar[str] = "multi30k"
    target: str = "de"
    """Suffix of the translations, e.g. de: of train.en it is train.de."""

    def __post_init__(self):
        super().__post_init__()
        for file in filter(None, (self.file, self.test_file)):
            if Path(file).suffix in ("", f".{self.target}"):
                raise UserError(f"multi30k: target is {self.target!r}: give a suffix other than that of {file!r}")

    def files(self, file: str) -> list[str]:
        return [file, str(Path(file).with_suffix(f".{self.target}"))]

    def examples(self, file: str) -> Iterator[Example]:
        return parallel(*self.files(file))

    def questions(self, example: Example) -> Iterator[tuple[str, str]]:
        yield "\nTranslation:", " " + example.label
