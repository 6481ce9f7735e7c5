"""Does the corpus come from where it should, and is held-out text really held out?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxprune.errors import UserError
from ctxprune.text.corpus import (
    file_documents,
    hub_documents,
    size,
    source_fingerprint,
    split_documents,
    stdlib_documents,
    take,
)

WORDS = st.text(alphabet="ab é\n\t漢", min_size=1, max_size=40)


def test_stdlib_is_code_of_the_library_alone() -> None:
    documents = stdlib_documents(64_000_000)
    total = sum(map(size, documents))
    assert total > 4_000_000
    assert any("def dataclass(" in document for document in documents)
    assert not any("decoding_table" in document and "codecs.charmap" in document for document in documents)
    assert max(map(size, documents)) < total / 20


def test_stdlib_is_the_same_text_every_time_and_bounded() -> None:
    documents = stdlib_documents(300_000)
    assert documents == stdlib_documents(300_000)
    assert 250_000 < sum(map(size, documents)) <= 300_000


def test_a_python_without_sources_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match=r"data\.source=files"):
        stdlib_documents(1000)


def test_stdlib_leaves_out_packages_tests_and_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted = {"b.py": "b = 1\n", "a/z.py": "z = 1\n", "encodings/utf_8.py": "import codecs\n"}
    unwanted = {
        "site-packages/x.py": "x",
        "json/tests/x.py": "x",
        "test/x.py": "x",
        "idlelib/x.py": "x",
        "encodings/cp437.py": "decoding_table = 'x'",
        "_sysconfigdata_linux.py": "x",
        "empty.py": "",
        "data.txt": "x",
    }
    for name, text in (wanted | unwanted).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert stdlib_documents(1000) == ["z = 1\n", "b = 1\n", "import codecs\n"]


@given(st.lists(WORDS, max_size=8), st.integers(1, 120))
def test_taken_text_is_a_bounded_prefix(documents: list[str], max_bytes: int) -> None:
    taken = take(iter(documents), max_bytes)
    filled = [document for document in documents if document.strip()]
    assert sum(map(size, taken)) <= max_bytes
    assert "".join(filled).startswith("".join(taken))
    if sum(map(size, filled)) <= max_bytes:
        assert taken == filled


def test_reading_stops_at_the_bound() -> None:
    def documents():
        yield "a" * 60
        yield "b" * 60
        pytest.fail("read past the bound")

    assert take(documents(), 100) == ["a" * 60, "b" * 40]


@given(st.lists(WORDS, min_size=1, max_size=30), st.floats(0.01, 0.5), st.randoms())
def test_held_out_documents_are_never_trained_on(documents: list[str], share: float, random) -> None:
    try:
        train, held_out = split_documents(documents, share)
    except UserError as error:
        assert sum(map(size, set(documents))) < 20, "only tiny texts may be refused"
        assert "give more text" in str(error)
        return
    assert train and held_out and all(train) and all(held_out)
    assert not set(train) & set(held_out)
    shuffled = list(documents)
    random.shuffle(shuffled)
    again = split_documents(shuffled, share)
    assert (set(again[0]), set(again[1])) == (set(train), set(held_out))


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.sampled_from([0.02, 0.05, 0.2, 0.5]))
def test_held_out_share_is_within_a_factor_of_two(lengths: list[int], share: float) -> None:
    documents = [f"{index} " + "word\n" * length for index, length in enumerate(lengths)]
    total = sum(map(size, documents))
    if total * share < 20:  # a few bytes: one line more or less is a factor of its own
        return
    train, held_out = split_documents(documents, share)
    assert share / 2 - 5 / total <= sum(map(size, held_out)) / total <= 2 * share
    assert sum(map(size, train)) + sum(map(size, held_out)) == total


def test_one_document_is_cut_at_a_line() -> None:
    document = "".join(f"line {number}\n" for number in range(1000))
    [head], [tail] = split_documents([document], 0.1)
    assert head + tail == document
    assert head.endswith("\n")
    assert 0.05 < len(tail) / len(document) < 0.2


def test_repeated_documents_count_once() -> None:
    train, held_out = split_documents(["one two\n" * 5, "three\n" * 9] * 50, 0.5)
    assert len(train) == len(held_out) == 1


def test_a_tail_that_is_a_document_too_is_not_trained_on() -> None:
    line = "x" * 9 + "\n"
    big = "".join(f"{number:09}\n" for number in range(99)) + line
    train, held_out = split_documents([big, line], 0.01)
    assert not set(train) & set(held_out)


def test_text_repeated_twice_still_gives_two_different_sides() -> None:
    train, held_out = split_documents(["ab\n" * 40], 0.5)
    assert not set(train) & set(held_out)


@pytest.mark.parametrize("share", [0.0, -0.1, 0.6, float("nan")])
def test_a_share_that_is_none_names_the_field(share: float) -> None:
    with pytest.raises(UserError, match=r"data\.held_out=.*\(0, 0\.5\]"):
        split_documents(["a b"], share)


@given(st.lists(WORDS, max_size=6), st.lists(WORDS, max_size=6))
def test_fingerprints_tell_corpora_apart(one: list[str], other: list[str]) -> None:
    assert (source_fingerprint(one) == source_fingerprint(other)) == (one == other)


def test_fingerprints_see_where_documents_end() -> None:
    assert len({source_fingerprint(documents) for documents in (["ab"], ["a", "b"], ["b", "a"], ["", "ab"])}) == 4


def test_files_are_joined_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("z")
    (tmp_path / "c.jsonl").write_text('{"text": "c1"}\n{"text": "c2"}\n')
    (tmp_path / "empty.txt").write_text("")
    assert file_documents(tmp_path, "text", 100) == ["z", "b", "c1", "c2"]
    assert file_documents(tmp_path, "text", 3) == ["z", "b", "c"]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(UserError, match="is empty"):
            file_documents(path, "text", 100)


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": f"row {number}", "n": number} for number in range(50)] + [{"text": None, "n": 0}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_data_set_rows_are_documents(data_set: Path) -> None:
    documents = hub_documents([str(data_set)], "text", 10_000)
    assert documents == [f"row {number}" for number in range(50)]


def test_data_sets_share_the_bound(data_set: Path) -> None:
    documents = hub_documents([str(data_set), str(data_set)], "text", 50)
    assert sum(map(size, documents)) <= 50
    assert documents.count("row 0") == 2


@pytest.mark.parametrize(
    ("name", "field", "says"),
    [
        ("set", "body", "no column 'body'.*text, n"),
        ("set", "n", "column 'n'.* is not text"),
        ("missing", "text", "missing' does not load"),
    ],
)
def test_a_data_set_that_does_not_load_is_named(data_set: Path, name: str, field: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        hub_documents([str(data_set.parent / name)], field, 100)
    assert "\n" not in str(caught.value)


def test_no_data_set_names_the_field() -> None:
    with pytest.raises(UserError, match=r"data\.names"):
        hub_documents([], "text", 100)
