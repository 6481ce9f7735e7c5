"""Where does text come from, and which of it is never trained on? Documents (plain strings) and a split by content."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from ctxprune.errors import UserError
from ctxprune.text.data_sets import streamed
from ctxprune.text.files import named, read_documents, text_files

# Not code or prose a person wrote to be read: packages that are not the library itself, tests, generated tables.
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_NOT_PROSE = {"lib2to3", "idlelib", "turtledemo", "pydoc_data"}


def stdlib_documents(max_bytes: int) -> list[str]:
    """The interpreter's own standard library, one document per .py file, in the order of the relative paths.

    Every machine that runs Python has this text (about 9 MB), so nothing is downloaded; it differs between versions of
    Python. At most `max_bytes` of UTF-8 are returned. Raises UserError where the library is not a folder of sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = take(_stdlib_texts(root), max_bytes)
    if not documents:
        raise UserError(
            f"no Python sources under {named(root)}: set data.source=files and data.path to text of your own"
        )
    return documents


def _stdlib_texts(root: Path) -> Iterator[str]:
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY | _NOT_PROSE]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        # _sysconfigdata_* is a dump of one machine's Makefile.
        if path.name.startswith("_sysconfigdata") or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a source in another encoding, or not ours to read: one file less
            continue
        # Codecs of one byte per character are 256-line tables; the others are code.
        if path.parent.name == "encodings" and ("decoding_table" in text or "decoding_map" in text):
            continue
        if text.strip():
            yield text


def file_documents(path: Path, text_field: str, max_bytes: int) -> list[str]:
    """The documents of a file, or of every .txt, .md, .py, .jsonl, .json, .csv and .tsv file below a folder (sorted).

    A text file is one document, or several when lines that are exactly `<|endoftext|>` part it; a row of the other
    formats is one document, its column `text_field`. Hidden files and empty documents are left out. At most `max_bytes`
    of UTF-8 are returned. Raises UserError, naming the file, when it is missing, empty, not UTF-8, not a regular file,
    reached through a link out of the folder, or without that column.
    """
    path = Path(path)

    def everything() -> Iterator[str]:
        for file in text_files(path):
            yield from read_documents(file, text_field, max_bytes)

    documents = take(everything(), max_bytes)
    if not documents:
        raise UserError(f"{named(path)} is empty: data.path must hold some text")
    return documents


def hub_documents(names: list[str], text_field: str, max_bytes: int) -> list[str]:
    """The column `text_field` of the train split of each data set, `name` or `name:config`, one document per row.

    A name is a hub id or a local data set folder. Rows are streamed, so that no more than `max_bytes` of UTF-8 (shared
    evenly by the names) is read. Raises UserError when a data set does not load or has no such column.
    """
    if not names:
        raise UserError("data.source=hub needs data.names, e.g. data.names=[name] or data.names=[name:config]")
    documents: list[str] = []
    left = max_bytes
    for index, name in enumerate(names):
        taken = take(_hub_rows(name, text_field), left // (len(names) - index))
        if not taken:
            raise UserError(f"data set {name!r} has no text in column {text_field!r} of its train split")
        documents += taken
        left -= sum(size(document) for document in taken)
    return documents


def _hub_rows(name: str, text_field: str) -> Iterator[str]:
    place, _, config = (name, "", "") if Path(name).exists() else name.partition(":")
    for row in streamed(place, config or None, called=repr(name)):
        if text_field not in row:
            columns = ", ".join(map(str, row))
            raise UserError(f"data set {name!r} has no column {text_field!r}: set data.text_field to one of {columns}")
        if isinstance(row[text_field], str):
            yield row[text_field]
        elif row[text_field] is not None:
            raise UserError(f"column {text_field!r} of data set {name!r} is not text: set data.text_field to another")


def take(documents: Iterable[str], max_bytes: int) -> list[str]:
    """The first `max_bytes` of UTF-8 in `documents`: blank documents are left out, the last one is cut at a line."""
    taken: list[str] = []
    left = max_bytes
    for document in documents:
        if not document.strip():
            continue
        if size(document) >= left:
            data = document.encode()
            head = data if len(data) == left else data[: _boundary(data, left, left // 2, latest=left)]
            return taken + ([head.decode()] if head.strip() else [])
        taken.append(document)
        left -= size(document)
    return taken


def split_documents(documents: list[str], held_out: float) -> tuple[list[str], list[str]]:
    """(train, held out): every so many-th document in order of size is held out, so that both sides hold documents of
    the same lengths (how much context a model can drop depends on them), then others until the share of the bytes is
    met.

    Depends on the content alone, not on the order of the documents, which both sides keep. A repeated document counts
    once, so no document is on both sides. Documents that would overshoot the share by more than half are passed over;
    when whole documents can't come within a factor 2 of the share, the end of the largest one is held out, cut at a
    line (or space). Raises UserError for a share outside (0, 0.5] or too little text.
    """
    if not 0 < held_out <= 0.5:
        raise UserError(f"data.held_out={held_out} is not a share of the text: choose it in (0, 0.5], e.g. 0.05")
    unique = {document: size(document) for document in documents if document}
    target = held_out * sum(unique.values())
    held: set[str] = set()
    have = 0
    for document in _spread_over_sizes(unique, held_out):
        if have < target and have + unique[document] <= 1.5 * target:
            held.add(document)
            have += unique[document]
    train = [document for document in unique if document not in held]
    kept_out = [document for document in unique if document in held]
    if have >= target / 2 and train and kept_out:
        return train, kept_out
    if not train or max(unique[document] for document in train) < 2:
        raise UserError("there is too little text to hold some of it out: give more text")
    largest = max(train, key=lambda document: (unique[document], document))
    head, tail = _cut(largest, max(1, round(target - have)))
    kept_out.append(tail)
    train = [head if document == largest else document for document in train]
    # The tail may happen to be a document of its own (or the head one that is held out).
    train = [document for document in train if document not in kept_out]
    if not train:
        raise UserError("there is too little text to hold some of it out: give more text")
    return train, kept_out


def _spread_over_sizes(sizes: dict[str, int], share: float) -> list[str]:
    """All documents, first the middle one of each run of 1/share documents in order of size, then the rest by hash."""
    digest = {document: hashlib.sha256(document.encode()).digest() for document in sizes}
    ordered = sorted(sizes, key=lambda document: (sizes[document], digest[document]))
    picked = {
        document for index, document in enumerate(ordered) if int((index + 1) * share + 0.5) > int(index * share + 0.5)
    }
    # By hash within each part: a guard on the share then leaves out a document of any size, not the longest ones.
    return sorted(sizes, key=lambda document: (document not in picked, digest[document]))


def _cut(document: str, tail: int) -> tuple[str, str]:
    """`document` in two: the second part about `tail` bytes long, neither empty, cut at a line where there is one."""
    data = document.encode()
    at = _boundary(data, len(data) - tail, tail // 2, latest=len(data) - 1)
    if 2 * at == len(data) and data[:at] == data[at:]:  # the same text twice: uneven parts differ at least in length
        at = _boundary(data, min(at + 4, len(data) - 1), 0, latest=len(data) - 1)
    if not 0 < at < len(data):
        raise UserError("there is too little text to hold some of it out: give more text")
    return data[:at].decode(), data[at:].decode()


def _boundary(data: bytes, at: int, reach: int, latest: int) -> int:
    """The line end nearest to byte `at` (within `reach` bytes, at most `latest`), else a space, else a character."""
    for mark in (b"\n", b" "):
        before = data.rfind(mark, max(0, at - reach), at) + 1
        after = data.find(mark, at, min(at + reach, latest)) + 1
        near = [place for place in (before, after) if 0 < place <= latest]
        if near:
            return min(near, key=lambda place: abs(place - at))
    while 0 < at < len(data) and data[at] & 0xC0 == 0x80:  # inside a UTF-8 character
        at -= 1
    return at


def size(document: str) -> int:
    """Bytes of `document` in UTF-8."""
    return len(document) if document.isascii() else len(document.encode())


def source_fingerprint(documents: Iterable[str]) -> str:
    """sha256 of the documents in their order, each with its length: the key of a prepared corpus, 64 hex digits."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
