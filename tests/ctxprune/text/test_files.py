"""Are the documents of a file exactly its text, and is each broken file named in one line?"""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxprune.errors import UserError
from ctxprune.text.files import read_documents, text_files


def documents(file: Path, field: str = "text", max_bytes: int = 10_000) -> list[str]:
    return list(read_documents(file, field, max_bytes))


def test_only_whole_lines_part_documents(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\r\n<|endoftext|>\r\ntwo <|endoftext|>\n <|endoftext|>\n<|endoftext|>\nthree\n<|endoftext|>")
    assert documents(file) == ["one\n", "two <|endoftext|>\n <|endoftext|>\n", "three\n", ""]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff")), st.integers(0, 8))
def test_text_survives_reading_and_a_cut_leaves_whole_characters(
    tmp_path_factory: pytest.TempPathFactory, text: str, max_bytes: int
) -> None:
    file = tmp_path_factory.mktemp("text") / "a.md"
    file.write_bytes(text.encode())
    if "<|endoftext|>" not in text:
        assert documents(file) == [text]
    [cut] = documents(file, max_bytes=max_bytes)
    assert text.startswith(cut)
    assert len(cut.encode()) >= min(max_bytes, len(text.encode()))


ROWS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=5)


@given(ROWS)
def test_every_format_gives_the_same_rows(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    objects = [{"id": 1, "text": row} for row in rows]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects)
    (folder / "lines.jsonl").write_bytes(lines.encode())
    (folder / "array.json").write_text(json.dumps(objects, indent=1))
    (folder / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in objects))
    for suffix, dialect in (("csv", "excel"), ("tsv", "excel-tab")):
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, ["id", "text"], dialect=dialect, quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(objects)
        (folder / f"table.{suffix}").write_bytes(table.getvalue().encode())
    for file in text_files(folder):
        assert documents(file) == rows, file.name


def test_one_object_and_null_rows(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text('{\n"text": "a"\n}\n')
    (tmp_path / "null.jsonl").write_text('{"text": null}\n\n{"text": "b"}')
    assert documents(tmp_path / "one.json") == ["a"]
    assert documents(tmp_path / "null.jsonl") == ["b"]


def test_a_long_field_is_read_and_the_csv_module_left_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * (before + 1) + "\n")
    assert [len(document) for document in documents(tmp_path / "a.csv")] == [before + 1]
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "text".encode("utf-16"), "is UTF-16"),
        ("a.csv", "text\nx".encode("utf-16"), "is UTF-16"),
        ("a.txt", b"a\0b", "NUL bytes"),
        ("a.jsonl", b'{"text": "a\0b"}', "NUL bytes"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt", b"caf\xc3", "not UTF-8"),
        ("a.jsonl", b'{"text": "\xe9"}', "not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', "row 1: 'text' is not UTF-8"),
        ("a.jsonl", b'{"body": "x", "id": 1}', "no column 'text'.*'body', 'id'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 7}\n', "row 2: column 'text' holds int"),
        ("a.jsonl", b"[1]", "row 1 is not an object"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.json", b'{"text": "x"', "not JSON"),
        ("a.csv", b"body,id\nx,1\n", "no column 'text'.*'body', 'id'"),
        ("a.tsv", b'text\n"x', "not a table"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        documents(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    for name in ("b.TXT", "a.jsonl", "c.png", ".hidden.txt", ".git/x.txt", "d/e.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [str(file.relative_to(tmp_path)) for file in text_files(tmp_path)] == ["a.jsonl", "b.TXT", "d/e.csv"]


def test_missing_and_unknown_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_text("x")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, says in [
        ("none\nsuch", "does not exist"),
        ("a.bin", "not a kind of text file"),
        ("pipe.txt", "not a regular file"),
        ("sub", "holds no text file"),
    ]:
        with pytest.raises(UserError, match=says) as caught:
            text_files(tmp_path / name)
        assert repr(name)[1:-1] in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_pipe_in_the_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"pipe\.txt' is not a regular file"):
        text_files(tmp_path)


@pytest.mark.parametrize("target", ["../outside/secret.txt", "../outside", "nowhere.txt", "loop.txt"])
def test_links_do_not_lead_out_of_the_folder(tmp_path: Path, target: str) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (folder / "a.txt").write_text("a")
    (folder / "loop.txt").symlink_to(target)
    with pytest.raises(UserError, match=r"loop\.txt' is a link out of"):
        text_files(folder)


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("data/a.txt")
    (tmp_path / "again").symlink_to("data")
    assert [file.name for file in text_files(tmp_path)] == ["b.txt", "a.txt"]


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.txt' can't be read \(No such file"):
        documents(tmp_path / "gone.txt")
