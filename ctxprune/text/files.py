"""Which files hold text, and what documents are in one? Text, JSON lines and tables; each mistake names its file."""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from ctxprune.errors import UserError

DOCUMENT_END = "<|endoftext|>"
"""A line that is exactly this parts two documents of a text file."""

_TEXT = {".txt", ".md", ".py"}
_SUFFIXES = {*_TEXT, ".jsonl", ".json", ".csv", ".tsv"}
_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_LONGEST_FIELD = 2**31 - 1  # bytes; a C long on every platform


def named(path: Path) -> str:
    """`path` as an error names it: quoted and on one line, whatever odd characters it has."""
    return repr(str(path))


def text_files(path: Path) -> list[Path]:
    """`path` itself, or the text files below that folder in sorted order; hidden files and folders are left out.

    Raises UserError for a missing path, a folder with no text file, anything that is not a regular file, and a link
    that leads out of the folder (one to a folder inside is passed over: its files come under their own name).
    """
    if not path.exists():
        raise UserError(f"{named(path)} does not exist: data.path must be a text file or a folder of them")
    kinds = " ".join(sorted(_SUFFIXES))
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{named(path)} is not a regular file: data.path must be a text file or a folder of them")
        if path.suffix.lower() not in _SUFFIXES:
            raise UserError(f"{named(path)} is not a kind of text file that is read: rename it to one of {kinds}")
        return [path]
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            _stays_inside(Path(folder, name), path)
        wanted = [name for name in names if not name.startswith(".") and Path(name).suffix.lower() in _SUFFIXES]
        for file in (Path(folder, name) for name in wanted):
            _stays_inside(file, path)
            if not stat.S_ISREG(file.stat().st_mode):
                raise UserError(f"{named(file)} is not a regular file: take it out of the folder")
            files.append(file)
    if not files:
        raise UserError(f"{named(path)} holds no text file: data.path wants some of {kinds}")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _stays_inside(entry: Path, root: Path) -> None:
    if not entry.is_symlink():
        return
    try:
        inside = entry.resolve(strict=True).is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # dangling, or a circle of links
        inside = False
    if not inside:
        raise UserError(f"{named(entry)} is a link out of {named(root)} or to nowhere: copy the file into the folder")


def read_documents(file: Path, text_field: str, max_bytes: int) -> Iterator[str]:
    """The documents of one text file, of which at most about `max_bytes` are read (a .json array is read whole).

    Raises UserError, naming the file and the row, for text that is not UTF-8, broken rows and a missing column.
    """
    suffix = file.suffix.lower()
    try:
        if suffix in _TEXT:
            yield from _parts(_decoded(file, max_bytes))
        elif suffix == ".json":
            yield from _column(file, _json_rows(file), text_field)
        elif suffix == ".jsonl":
            yield from _column(file, _jsonl_rows(file), text_field)
        else:
            yield from _column(file, _table_rows(file, "," if suffix == ".csv" else "\t"), text_field)
    except UnicodeDecodeError as error:
        raise UserError(f"{named(file)} is not UTF-8: convert it, or take it out") from error
    except OSError as error:
        raise UserError(f"{named(file)} can't be read ({error.strerror or type(error).__name__})") from error


def _decoded(file: Path, max_bytes: int) -> str:
    with file.open("rb") as stream:
        data = stream.read(max_bytes + 4)  # a character has at most 4 bytes, so the cut one is past max_bytes
        whole = not stream.read(1)
    _refuse_binary(file, data)
    # The incremental decoder forgives a character cut at the end, and only there.
    text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=whole)
    return text.replace("\r\n", "\n")


def _refuse_binary(file: Path, data: bytes) -> None:
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            raise UserError(f"{named(file)} is {encoding}, not UTF-8: convert it, or take it out")
    if b"\0" in data:
        raise UserError(f"{named(file)} holds NUL bytes, so it is not UTF-8 text: convert it, or take it out")


def _parts(text: str) -> list[str]:
    return re.split(rf"(?m)^{re.escape(DOCUMENT_END)}(?:\n|\Z)", text)


def _lines(file: Path) -> Iterator[str]:
    with file.open("rb") as stream:
        _refuse_binary(file, stream.read(1 << 20))
    with file.open(encoding="utf-8-sig", newline="") as stream:
        for line in stream:
            if "\0" in line:
                _refuse_binary(file, b"\0")
            yield line


def _jsonl_rows(file: Path) -> Iterator[object]:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            yield _loaded(file, line, f"line {number}")


def _json_rows(file: Path) -> Iterator[object]:
    """Rows of a .json file: an array of objects, one object, or JSON lines under that name."""
    text = "".join(_lines(file))
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and all(line.lstrip().startswith("{") and line.rstrip().endswith("}") for line in lines):
        yield from (_loaded(file, line, "line") for line in lines)
    elif lines:
        value = _loaded(file, text, "file")
        yield from value if isinstance(value, list) else [value]


def _loaded(file: Path, text: str, place: str) -> object:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        cause = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise UserError(f"{named(file)} {place} is not JSON ({cause}): mend it, or take it out") from error


def _table_rows(file: Path, delimiter: str) -> Iterator[object]:
    # The csv module refuses fields over 128 KiB unless told otherwise; documents are longer.
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield from csv.DictReader(_lines(file), delimiter=delimiter, strict=True)
    except csv.Error as error:
        raise UserError(f"{named(file)} is not a table of rows ({error}): mend it, or take it out") from error
    finally:
        csv.field_size_limit(limit)


def _column(file: Path, rows: Iterator[object], text_field: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{named(file)} row {number} is not an object with a column {text_field!r}: mend it")
        if text_field not in row:
            columns = ", ".join(repr(column) for column in row if column is not None)
            raise UserError(f"{named(file)} has no column {text_field!r}: set data.text_field to one of {columns}")
        text = row[text_field]
        if text is None:  # null, or a row of a table that ends early
            continue
        if not isinstance(text, str):
            raise UserError(f"{named(file)} row {number}: column {text_field!r} holds {type(text).__name__}, not text")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell and UTF-8 can't
            raise UserError(f"{named(file)} row {number}: {text_field!r} is not UTF-8 text: mend it") from error
        yield text
