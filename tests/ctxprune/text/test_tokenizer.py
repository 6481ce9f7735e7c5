"""Do token ids stand for exactly the text, one document apart from the next, the same on every run?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ctxprune.errors import UserError
from ctxprune.text.tokenizer import (
    END_OF_TEXT,
    _pieces,
    _plain_encoder,
    _sample,
    document_start_id,
    encode_documents,
    fingerprint,
    load_tokenizer,
    train_tokenizer,
)

PROSE = [f"def step_{n}(state):\n    '''Advance the state {n} times.'''\n    return state + {n}\n" for n in range(200)]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(PROSE, 300)


@pytest.fixture
def gpt2_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    tokenizer.backend_tokenizer.model.save(str(tmp_path))
    return tmp_path


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Like a Llama 2 tokenizer: each text starts with a space of its own, and a newline is one token."""
    vocab = {"<s>": 0, "<unk>": 1, "▁": 2, "\n": 3, "a": 4, "b": 5, "ab": 6, "▁a": 7}
    model = models.BPE(vocab, [("a", "b"), ("▁", "a")], unk_token="<unk>")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


@given(text=ANY_TEXT)
def test_any_text_comes_back_whole(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    [ids] = encode_documents(tokenizer, [text])
    assert ids[0] == document_start_id(tokenizer)
    assert tokenizer.decode(ids[1:].tolist()) == text


def test_text_that_spells_the_end_does_not_end_the_document(tokenizer: PreTrainedTokenizerFast) -> None:
    text = f"a {END_OF_TEXT} b"
    [ids] = encode_documents(tokenizer, [text])
    assert (ids == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(ids[1:].tolist()) == text
    assert tokenizer.eos_token_id in tokenizer(text).input_ids, "the caller's tokenizer is left as it was"


def test_the_vocabulary_is_the_one_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 300
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(END_OF_TEXT) == 0
    assert len(train_tokenizer([], 257)) == 257


@pytest.mark.parametrize("vocab_size", [-1, 256, 65537])
def test_a_vocabulary_out_of_range_names_the_field(vocab_size: int) -> None:
    with pytest.raises(UserError, match=rf"data\.vocab_size={vocab_size} .* 257 to 65536"):
        train_tokenizer(PROSE, vocab_size)


def test_training_is_the_same_in_another_process(tokenizer: PreTrainedTokenizerFast) -> None:
    code = f"from ctxprune.text.tokenizer import *\nprint(fingerprint(train_tokenizer({PROSE!r}, 300)))"
    # Other threads and another hash seed: neither may decide between two equally frequent pairs.
    environment = os.environ | {
        "RAYON_NUM_THREADS": "3",
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(tokenizer)


def test_a_sample_is_spread_over_the_whole_text() -> None:
    documents = [f"{index:04}" * 10_000 for index in range(100)]
    pieces = list(_sample(documents, 800_000))
    assert 700_000 < sum(map(len, pieces)) <= 900_000
    assert pieces[0][:4] == "0000"
    assert int(pieces[-1][:4]) > 90
    assert "".join(_sample(documents, 10**9)) == "".join(documents)


@pytest.mark.parametrize("make", [lambda: train_tokenizer(PROSE, 300), sentencepiece_like])
def test_long_documents_are_encoded_as_if_whole(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctxprune.text.tokenizer._PIECE", 100)
    monkeypatch.setattr("ctxprune.text.tokenizer._CHUNK", 300)
    tokenizer = make()
    encoder = _plain_encoder(tokenizer)
    documents = ["ab\n\n a b\nb\n" * 60 + "ab " * 300, "a", "b\nab\n" * 50]
    assert len(list(_pieces(encoder, documents))) > 10
    for document, ids in zip(documents, encode_documents(tokenizer, documents), strict=True):
        assert ids[1:].tolist() == encoder.encode(document, add_special_tokens=False).ids
        assert ids[0] == 0


def test_a_cut_that_would_change_ids_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctxprune.text.tokenizer._PIECE", 20)
    vocab = {"<s>": 0, "a": 1, "b": 2, "\n": 3, "\nb": 4}
    backend = Tokenizer(models.BPE(vocab, [("\n", "b")]))  # a token that reaches over a line end
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    document = "a\nb" * 50
    assert len(list(_pieces(_plain_encoder(tokenizer), [document]))) == 1
    assert encode_documents(tokenizer, [document])[0].tolist() == [0, *[1, 4] * 50]


def test_progress_rises_to_the_end_and_long_text_warns_of_nothing(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ctxprune.text.tokenizer._CHUNK", 1000)
    tokenizer.model_max_length = 16
    seen: list[tuple[int, int]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_documents(tokenizer, PROSE, lambda done, total: seen.append((done, total)))
    total = sum(map(len, PROSE))
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert seen[-1] == (total, total)
    assert not caplog.records


def test_truncation_left_in_a_tokenizer_does_not_shorten_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    before = fingerprint(tokenizer)
    tokenizer(PROSE[0], truncation=True, max_length=4)
    assert len(encode_documents(tokenizer, PROSE[:1])[0]) > 20
    assert fingerprint(tokenizer) == before


def test_fingerprints_tell_tokenizers_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    other = train_tokenizer(PROSE, 301)
    assert fingerprint(other) != fingerprint(tokenizer)
    before = fingerprint(other)
    other.bos_token = "a"
    assert fingerprint(other) != before


@pytest.mark.parametrize("with_config", [False, True])
def test_a_saved_tokenizer_loads_as_itself(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, with_config: bool
) -> None:
    tokenizer.save_pretrained(tmp_path)
    if with_config:  # a model beside it: its family must not decide how text is read
        LlamaConfig().save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert fingerprint(loaded) == fingerprint(tokenizer)
    assert document_start_id(loaded) == 0


def test_gpt2_files_load(tokenizer: PreTrainedTokenizerFast, gpt2_folder: Path) -> None:
    assert {file.name for file in gpt2_folder.iterdir()} == {"vocab.json", "merges.txt"}
    loaded = load_tokenizer(str(gpt2_folder))
    for ours, theirs in zip(encode_documents(tokenizer, PROSE), encode_documents(loaded, PROSE), strict=True):
        assert ours.tolist() == theirs.tolist()
    assert len(loaded) == len(tokenizer)


def test_gpt2_files_that_do_not_fit_are_named(gpt2_folder: Path) -> None:
    (gpt2_folder / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(UserError, match=r"vocab\.json") as caught:
        load_tokenizer(str(gpt2_folder))
    assert str(gpt2_folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_text("x"), lambda path: None])
def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path, make) -> None:
    path = tmp_path / "model"
    make(path)
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_documents_open_with_bos_else_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    def ends(**tokens: str) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokens)

    assert document_start_id(ends(bos_token="a", eos_token="b")) == tokenizer.convert_tokens_to_ids("a")
    assert document_start_id(ends(eos_token="b")) == tokenizer.convert_tokens_to_ids("b")
    with pytest.raises(UserError, match="neither a bos nor an eos"):
        document_start_id(ends())
