"""How do token ids lie on disk? Two flat arrays per corpus, trained on and held out, and where each document starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctxprune.errors import UserError
from ctxprune.text.tokenizer import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SPLITS = ("train", "held_out")
_RECORD = "tokens.json"


@dataclass(frozen=True)
class TokenSplit:
    """One side of the corpus: documents one after the other in a single array."""

    tokens: np.ndarray
    """Token ids, uint16 or uint32 [tokens], memory-mapped and read-only when read from disk."""
    starts: np.ndarray
    """Index of each document's first token, int64 [documents], rising from 0."""


@dataclass(frozen=True)
class TokenStore:
    """A prepared corpus."""

    train: TokenSplit
    held_out: TokenSplit
    vocab_size: int
    """Entries of the tokenizer, special tokens included; every id is below."""
    tokenizer_fingerprint: str
    """`text.tokenizer.fingerprint` of the tokenizer that made the ids; it lies in the folder `tokenizer` beside."""


def write_tokens(
    folder: Path, train: list[np.ndarray], held_out: list[np.ndarray], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Write a corpus (one array of ids per document) and its tokenizer to `folder`, which is made if need be.

    tokens.json is written last: a folder without it was not finished. Raises UserError when a side has no tokens, and
    ValueError for ids outside the vocabulary.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _RECORD).unlink(missing_ok=True)
    vocab_size = len(tokenizer)
    record: dict[str, object] = {"vocab_size": vocab_size, "tokenizer": fingerprint(tokenizer)}
    for name, documents in zip(_SPLITS, (train, held_out), strict=True):
        split = pack(documents, vocab_size)
        if not split.tokens.size:
            raise UserError(f"the {_spoken(name)} text has no tokens: give more text")
        np.save(folder / f"{name}.npy", split.tokens, allow_pickle=False)
        np.save(folder / f"{name}_starts.npy", split.starts, allow_pickle=False)
        record[name] = {"tokens": int(split.tokens.size), "documents": int(split.starts.size)}
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def pack(documents: list[np.ndarray], vocab_size: int) -> TokenSplit:
    """The documents (ids, each array 1-D; empty ones are left out) in one array.

    Raises ValueError for an id outside [0, vocab_size).
    """
    documents = [document for document in documents if len(document)]
    dtype = np.uint16 if vocab_size <= 65536 else np.uint32
    if not documents:
        return TokenSplit(np.empty(0, dtype), np.empty(0, np.int64))
    tokens = np.concatenate(documents)
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"token ids must be integers, not {tokens.dtype}")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"token ids {tokens.min()}..{tokens.max()} are outside a vocabulary of {vocab_size}")
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    return TokenSplit(tokens.astype(dtype), np.concatenate([np.zeros(1, np.int64), ends[:-1]]))


def read_tokens(folder: Path) -> TokenStore:
    """The corpus that `write_tokens` left in `folder`, its tokens memory-mapped.

    Raises UserError, naming the file, when one is missing, is not what was written, or holds ids out of
    the vocabulary.
    """
    folder = Path(folder)
    record_path = folder / _RECORD
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        vocab_size, tokenizer = int(record["vocab_size"]), str(record["tokenizer"])
        counts = {name: (int(record[name]["tokens"]), int(record[name]["documents"])) for name in _SPLITS}
    except FileNotFoundError as error:
        raise UserError(
            f"{str(folder)!r} holds no prepared text ({_RECORD} is missing): prepare the data again"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(record_path, "is not a record of token counts") from error
    train, held_out = (_read_split(folder, name, counts[name], vocab_size) for name in _SPLITS)
    return TokenStore(train, held_out, vocab_size, tokenizer)


def _read_split(folder: Path, name: str, counts: tuple[int, int], vocab_size: int) -> TokenSplit:
    tokens_path, starts_path = folder / f"{name}.npy", folder / f"{name}_starts.npy"
    tokens, starts = _read_array(tokens_path), _read_array(starts_path)
    if tokens.dtype != (np.uint16 if vocab_size <= 65536 else np.uint32):
        raise _damaged(tokens_path, f"holds {tokens.dtype}, not ids of a vocabulary of {vocab_size}")
    if starts.dtype != np.int64:
        raise _damaged(starts_path, f"holds {starts.dtype}, not int64")
    for path, array, count in ((tokens_path, tokens, counts[0]), (starts_path, starts, counts[1])):
        if array.shape != (count,) or not count:
            raise _damaged(path, f"has shape {array.shape}, but {_RECORD} says {count}")
    if starts[0] != 0 or np.any(np.diff(starts) <= 0) or starts[-1] >= len(tokens):
        raise _damaged(starts_path, "does not rise from 0 to the last document")
    if tokens.max() >= vocab_size:
        raise _damaged(tokens_path, f"holds id {tokens.max()}, outside a vocabulary of {vocab_size}")
    return TokenSplit(tokens, starts)


def _read_array(path: Path) -> np.ndarray:
    if not path.is_file():  # a pipe would block, a folder has no bytes
        raise _damaged(path, "is missing or not a regular file")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, "is not a whole .npy file of numbers") from error
    if not isinstance(array, np.ndarray):  # an .npz archive under our name
        array.close()
        raise _damaged(path, "is not a .npy file")
    return array


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{str(path)!r} {why}: delete its folder and prepare the data again")


def _spoken(name: str) -> str:
    return name.replace("_", "-")
