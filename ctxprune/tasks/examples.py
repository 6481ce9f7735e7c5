"""Which examples does a labelled file hold, and which are held out? Tables, tagged words, JSON lines, parallel texts.

Every mistake in a file is a UserError of one line that names the file and the line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ctxprune.errors import UserError
from ctxprune.tasks.task import Split
from ctxprune.text.data_sets import streamed
from ctxprune.text.files import named

_HELD_OUT = 20
"""One example in so many is for validation, and one for test where there is no file of its own."""


@dataclass(frozen=True)
class Example:
    """A text and what is to be said about it."""

    text: str
    label: str
    """A label, a summary or a translation."""
    words: tuple[str, ...] = ()
    """The words of the text where each has a tag of its own."""
    tags: tuple[str, ...] = ()
    """As many tags as words."""


def table(file: str, labels: tuple[str, ...] | None) -> Iterator[Example]:
    """Lines of text, tab, one of `labels` (None: any); a first line that names the columns (sentence or text, label) is
    none."""
    for number, line in _lines(file):
        if not line.strip() or (number == 1 and line.lower() in ("sentence\tlabel", "text\tlabel")):
            continue
        text, _, label = line.rpartition("\t")
        if not text.strip() or not label.strip():
            raise _broken(file, number, "is not a text, a tab and a label")
        if labels is not None:
            _known(file, number, label.strip(), labels)
        yield Example(text.strip(), label.strip())


def column_of_words(file: str, labels: tuple[str, ...] | None) -> Iterator[Example]:
    """CoNLL: lines of word, tab, one of `labels` (None: any); a blank line ends a sentence."""
    words: list[str] = []
    tags: list[str] = []
    for number, line in [*_lines(file), (0, "")]:
        if line.strip():
            word, _, tag = line.partition("\t")
            if not word.strip() or not tag.strip() or "\t" in tag:
                raise _broken(file, number, "is not a word, a tab and a tag")
            if labels is not None:
                _known(file, number, tag.strip(), labels)
            words.append(word.strip())
            tags.append(tag.strip())
        elif words:
            yield Example(" ".join(words), "", tuple(words), tuple(tags))
            words, tags = [], []


def json_lines(file: str, text_field: str, label_field: str) -> Iterator[Example]:
    """An object per line, with a text and what is to be said about it."""
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _broken(file, number, "is not JSON") from error
        for field in (text_field, label_field):
            if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field].strip():
                raise _broken(file, number, f"has no text in {field!r}")
        yield Example(row[text_field].strip(), row[label_field].strip())


def parallel(file: str, other: str) -> Iterator[Example]:
    """Line i of `file` and its translation, line i of `other`; lines that are blank in both are left out."""
    sources, targets = (list(_lines(name)) for name in (file, other))
    if len(sources) != len(targets):
        line = min(len(sources), len(targets)) + 1
        lines = f"{len(sources)} lines, {named(Path(other))} {len(targets)}"
        raise UserError(f"{named(Path(file))} has {lines}: they part at line {line}; give a translation for each line")
    for (number, source), (_, target) in zip(sources, targets, strict=True):
        if bool(source.strip()) != bool(target.strip()):
            raise _broken(file if not source.strip() else other, number, "is blank, its translation is not")
        if source.strip():
            yield Example(source.strip(), target.strip())


def held_out(examples: list[Example], tests: list[Example] | None) -> dict[Split, list[Example]]:
    """The examples of each split. No text is in two of them.

    Where there are no `tests`, one text in 20 becomes one; one in 20 is for validation. Which ones depends on
    the text alone, so that a file may grow or be sorted. Examples whose text is a test are not trained on; UserError
    where that is all of them.
    """
    of: dict[Split, list[Example]] = {"train": [], "validation": [], "test": list(tests or [])}
    tested = {example.text for example in of["test"]}
    for example in examples:
        number = int.from_bytes(hashlib.sha256(example.text.encode()).digest()[:8], "little") % _HELD_OUT
        if example.text in tested:
            continue
        if number == 0 and tests is None:
            of["test"].append(example)
        else:
            of["validation" if number == 1 else "train"].append(example)
    if examples and not of["train"] and not of["validation"]:
        raise UserError(
            "every text to learn from is a test as well: give another test file, or none, and some are held out"
        )
    return of


def labelled(file: str, text_field: str, labels: tuple[str, ...]) -> Iterator[Example]:
    """A table; or, of a local data set folder that the datasets library reads, the columns `text_field` and label."""
    return _data_set(file, text_field, labels) if Path(file).is_dir() else table(file, labels)


def _data_set(folder: str, text_field: str, labels: tuple[str, ...]) -> Iterator[Example]:
    for number, row in enumerate(streamed(folder, called=named(Path(folder))), 1):
        text, label = row.get(text_field), row.get("label")
        if not isinstance(text, str) or label is None:
            raise UserError(f"{named(Path(folder))} row {number} has no text in {text_field!r} and 'label': mend it")
        # A label that is an index (datasets' ClassLabel) stands for the label at that place.
        named_label = labels[label] if isinstance(label, int) and 0 <= label < len(labels) else str(label)
        _known(folder, number, named_label, labels)
        yield Example(text.strip(), named_label)


def changed(file: str) -> int:
    """When a file (or folder) was last written, ns since 1970; UserError if it is not there."""
    try:
        return Path(file).stat().st_mtime_ns
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{named(Path(file))} can't be read ({reason}): give the path of a text file") from error


def _lines(file: str) -> list[tuple[int, str]]:
    """(number from 1, line) of a UTF-8 file; UserError if it is missing, unreadable or empty."""
    changed(file)
    try:
        text = Path(file).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise _broken(file, line, "is not UTF-8") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{named(Path(file))} can't be read ({reason}): give the path of a text file") from error
    if not text.strip():
        raise UserError(f"{named(Path(file))} is empty: line 1 must hold an example")
    # Not splitlines: it also parts lines at characters that text may hold, such as U+2028.
    return list(enumerate(text.replace("\r\n", "\n").removesuffix("\n").split("\n"), 1))


def _known(file: str, number: int, label: str, labels: tuple[str, ...]) -> None:
    if label not in labels:
        raise _broken(file, number, f"has the label {label!r}, which is none of {', '.join(labels)}")


def _broken(file: str, number: int, why: str) -> UserError:
    return UserError(f"{named(Path(file))} line {number} {why}: mend it, or take it out")
