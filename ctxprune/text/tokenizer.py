"""Which integers stand for a text? Byte-level BPE trained on it, or the tokenizer a pretrained model brings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctxprune.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
"""Opens and closes a document in tokenizers trained here, as in GPT-2."""

_SMALLEST_VOCAB = 257  # every byte, and END_OF_TEXT
_LARGEST_VOCAB = 65536  # token ids of a vocabulary trained here fit uint16
_TRAINING_CHARACTERS = 16_000_000  # 4 s on one core; compression is within 0.5% of that from a quarter of the text
_PIECE = 65536  # characters of a document sampled or encoded together
_SEAM = 64  # characters on each side of a cut that are compared
_LINE_END = re.compile(r"\S\n(?=\S)")
_CHUNK = 1_000_000  # characters encoded between two calls of `progress`


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (as in GPT-2) of at most `vocab_size` entries, learned from `documents`.

    Lossless for any text: every byte has an id, no space is added. `<|endoftext|>` is id 0, bos and eos. The same
    documents give the same tokenizer. Of more than 16 million characters an even sample is used. A text with few
    distinct pairs gives fewer entries than asked for. Raises UserError for a vocabulary size outside [257, 65536].
    """
    from tokenizers import models, pre_tokenizers, trainers

    if not _SMALLEST_VOCAB <= vocab_size <= _LARGEST_VOCAB:
        span = f"{_SMALLEST_VOCAB} to {_LARGEST_VOCAB}"
        raise UserError(f"data.vocab_size={vocab_size} is out of range: a byte-level BPE has {span} entries")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_sample(documents, _TRAINING_CHARACTERS), trainer=trainer)
    return _wrapped(backend)


def _byte_level(model: BPE) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    special = END_OF_TEXT if backend.token_to_id(END_OF_TEXT) is not None else None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special,
        eos_token=special,
        clean_up_tokenization_spaces=False,
    )


def _sample(documents: list[str], limit: int) -> Iterator[str]:
    """All documents, or evenly spread pieces of them that hold about `limit` characters together."""
    total = sum(map(len, documents))
    share = min(1.0, limit / max(total, 1))
    seen = taken = 0
    for document in documents:
        for begin in range(0, len(document), _PIECE):
            piece = document[begin : begin + _PIECE]
            seen += len(piece)
            if taken < share * seen:
                taken += len(piece)
                yield piece


def load_tokenizer(folder_or_id: str) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder (tokenizer.json, or GPT-2's vocab.json and merges.txt) or of a hub id.

    Raises UserError when there is none, or none that the tokenizers library can run.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(folder_or_id)
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if {"vocab.json", "merges.txt"} <= names and not names & {"tokenizer.json", "tokenizer_config.json", "config.json"}:
        return _gpt2_tokenizer(folder)
    if not folder.is_dir() and (folder.is_absolute() or folder_or_id.startswith((".", "~")) or folder.exists()):
        raise UserError(f"{folder_or_id!r} is not a folder with a tokenizer: model.path must hold tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder_or_id)
    except Exception as error:  # transformers raises a different kind for every way a tokenizer can be missing
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{folder_or_id!r} has no tokenizer that loads (wants tokenizer.json): {cause[:300]}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer of {folder_or_id!r} is not a fast one: save it with a tokenizer.json")
    return tokenizer


def _gpt2_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    from tokenizers import models

    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the tokenizers library raises plain Exception
        cause = " ".join(str(error).split())
        raise UserError(f"{str(folder)!r} has a vocab.json and merges.txt that do not fit: {cause[:300]}") from error
    return _wrapped(_byte_level(model))


def document_start_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that opens every document: the tokenizer's bos, else its eos. Raises UserError when it has neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("the tokenizer has neither a bos nor an eos token: set bos_token in its tokenizer_config.json")


def encode_documents(
    tokenizer: PreTrainedTokenizerFast,
    documents: list[str],
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """One int32 array per document: the start id, then its tokens, with no other special token.

    Text that spells a special token stays text, so that no document can end another one. `progress(done, total)` is
    told the characters encoded so far, about once per million.
    """
    start = document_start_id(tokenizer)
    encoder = _plain_encoder(tokenizer)
    lead = len(encoder.encode("\n", add_special_tokens=False).ids)
    total = sum(map(len, documents))
    encoded: list[list[np.ndarray]] = []
    done = 0
    for chunk in _chunks(_pieces(encoder, documents)):
        for (opens, text), encoding in zip(chunk, _encode(encoder, chunk), strict=True):
            if opens:
                encoded.append([np.array([start, *encoding.ids], dtype=np.int32)])
            else:
                encoded[-1].append(np.array(encoding.ids[lead:], dtype=np.int32))
            done += len(text)
        if progress is not None:
            progress(done, total)
    return [np.concatenate(parts) for parts in encoded]


def _encode(encoder: Tokenizer, chunk: list[tuple[bool, str]]) -> list[Encoding]:
    texts = [text if opens else "\n" + text for opens, text in chunk]
    return encoder.encode_batch_fast(texts, add_special_tokens=False)


def _plain_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the backend that neither truncates, pads nor reads special tokens out of the text."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def _pieces(encoder: Tokenizer, documents: list[str]) -> Iterator[tuple[bool, str]]:
    """(opens a document, text): long documents in pieces, as the backend needs 150 bytes of memory per character.

    A piece ends between two lines, and only where the ids beside that place are the same without the cut. A piece that
    continues a document is encoded after a newline, whose ids are then dropped: some tokenizers treat the start of a
    text in a way of their own.
    """
    lead = len(encoder.encode("\n", add_special_tokens=False).ids)

    def ids(text: str) -> list[int]:
        return encoder.encode(text, add_special_tokens=False).ids

    for document in documents:
        begin, at = 0, _PIECE
        while line := _LINE_END.search(document, at):
            at = line.end()
            left, right = document[at - _SEAM : at], document[at : at + _SEAM]
            if ids(left + right) == ids(left) + ids("\n" + right)[lead:]:
                yield begin == 0, document[begin:at]
                begin = at
            at += _PIECE
        yield begin == 0, document[begin:]


def _chunks(pieces: Iterator[tuple[bool, str]]) -> Iterator[list[tuple[bool, str]]]:
    chunk: list[tuple[bool, str]] = []
    length = 0
    for piece in pieces:
        chunk.append(piece)
        length += len(piece[1])
        if length >= _CHUNK:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of what decides token ids: the serialised tokenizer, its bos and its eos; 64 hex digits."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left over from the latest call of the tokenizer, not part of what it is.
    state["truncation"] = state["padding"] = None
    state["ends"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
