"""Does a corpus come back from disk as it was written, and is a damaged one refused?"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ctxprune.errors import UserError
from ctxprune.text.token_store import pack, read_tokens, write_tokens
from ctxprune.text.tokenizer import encode_documents, fingerprint, load_tokenizer, train_tokenizer

TRAIN, HELD_OUT = ["one two three", "four", ""], ["five six"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([], 257)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    train, held_out = (encode_documents(tokenizer, documents) for documents in (TRAIN, HELD_OUT))
    write_tokens(tmp_path / "corpus", train, held_out, tokenizer)
    return tmp_path / "corpus"


def test_a_corpus_comes_back_as_written(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    store = read_tokens(folder)
    for split, documents in ((store.train, TRAIN), (store.held_out, HELD_OUT)):
        parts = np.split(split.tokens, split.starts[1:])
        assert [tokenizer.decode(part[1:].tolist()) for part in parts] == documents
        assert isinstance(split.tokens, np.memmap)
        assert split.tokens.dtype == np.uint16
        assert not split.tokens.flags.writeable
    assert (store.vocab_size, store.tokenizer_fingerprint) == (257, fingerprint(tokenizer))
    assert fingerprint(load_tokenizer(str(folder / "tokenizer"))) == store.tokenizer_fingerprint


def test_a_corpus_can_be_written_again(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    write_tokens(folder, [np.array([0, 1])], [np.array([0, 2, 3])], tokenizer)
    store = read_tokens(folder)
    assert (store.train.tokens.tolist(), store.held_out.tokens.tolist()) == ([0, 1], [0, 2, 3])


@given(st.lists(st.lists(st.integers(0, 70_000), max_size=5), max_size=6))
def test_packing_keeps_every_document(documents: list[list[int]]) -> None:
    split = pack([np.array(document, dtype=np.int64) for document in documents], 70_001)
    assert split.tokens.dtype == np.uint32
    filled = [document for document in documents if document]
    assert [part.tolist() for part in np.split(split.tokens, split.starts[1:]) if len(part)] == filled
    assert len(split.starts) == len(filled)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_the_largest_id_fits(vocab_size: int, dtype: type) -> None:
    split = pack([np.array([vocab_size - 1])], vocab_size)
    assert split.tokens.dtype == dtype
    assert split.tokens.tolist() == [vocab_size - 1]


@pytest.mark.parametrize("ids", [[0, 257], [-1], [0.5]])
def test_ids_outside_the_vocabulary_are_not_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, ids: list
) -> None:
    with pytest.raises(ValueError, match="token ids"):
        write_tokens(tmp_path, [np.array(ids)], [np.array([0])], tokenizer)
    with pytest.raises(UserError, match=r"tokens\.json is missing"):
        read_tokens(tmp_path)


def test_a_corpus_half_written_over_is_not_read(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="token ids"):
        write_tokens(folder, [np.array([0])], [np.array([257])], tokenizer)
    with pytest.raises(UserError, match=r"tokens\.json is missing"):
        read_tokens(folder)


def test_a_side_without_tokens_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="the held-out text has no tokens"):
        write_tokens(tmp_path, [np.array([0])], [], tokenizer)


def damage_record(folder: Path, **changes: object) -> None:
    record = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(record | changes))


def save(folder: Path, name: str, array: np.ndarray) -> None:
    np.save(folder / name, array, allow_pickle=True)


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_archive(path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, a=np.zeros(3))


TOKENS = np.arange(1, 20, dtype=np.uint16)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "tokens.json").unlink(), r"tokens\.json is missing"),
        (lambda f: (f / "tokens.json").write_text("{"), r"tokens\.json' is not a record"),
        (lambda f: (f / "tokens.json").write_text("[]"), r"tokens\.json' is not a record"),
        (lambda f: damage_record(f, vocab_size=None), r"tokens\.json' is not a record"),
        (lambda f: damage_record(f, vocab_size=80_000), r"train\.npy' holds uint16"),
        (lambda f: damage_record(f, vocab_size=50), r"train\.npy' holds id \d+, outside"),
        (lambda f: damage_record(f, train={"tokens": 5, "documents": 3}), r"train\.npy' has shape"),
        (lambda f: damage_record(f, held_out={"tokens": 9, "documents": 2}), r"held_out_starts\.npy' has shape"),
        (lambda f: (f / "train.npy").unlink(), r"train\.npy' is missing"),
        (lambda f: as_pipe(f / "train.npy"), r"train\.npy' is missing or not a regular file"),
        (lambda f: as_archive(f / "train.npy"), r"train\.npy' is not a \.npy file"),
        (lambda f: os.truncate(f / "train.npy", 135), r"train\.npy' is not a whole"),
        (lambda f: (f / "train.npy").write_bytes(b""), r"train\.npy' is not a whole"),
        (lambda f: save(f, "train.npy", np.array([{}, 1], dtype=object)), r"train\.npy' is not a whole"),
        (lambda f: save(f, "train.npy", TOKENS.astype(np.int64)), r"train\.npy' holds int64"),
        (lambda f: save(f, "train.npy", TOKENS[None]), r"train\.npy' has shape \(1, 19\)"),
        (lambda f: save(f, "train_starts.npy", np.array([0, 14, 14])), r"train_starts\.npy' does not rise"),
        (lambda f: save(f, "train_starts.npy", np.array([1, 2, 3])), r"train_starts\.npy' does not rise"),
        (lambda f: save(f, "train_starts.npy", np.array([0, 2, 20])), r"train_starts\.npy' does not rise"),
        (lambda f: save(f, "train_starts.npy", np.array([0.0, 2, 3])), r"train_starts\.npy' holds float64"),
    ],
)
def test_a_damaged_corpus_is_refused_in_one_line(folder: Path, damage, says: str) -> None:
    read_tokens(folder)
    damage(folder)
    with pytest.raises(UserError, match=says) as caught:
        read_tokens(folder)
    assert "prepare the data again" in str(caught.value)
    assert "\n" not in str(caught.value)
