"""How does an example become tokens? Context, then question and answer for a decoder; words and labels for an encoder.

One shape serves both. A decoder reads context, prompt, answer and so on, padded on the left, and `answers` are token
ids. An encoder reads the text between the special tokens of its tokenizer, padded on the right, and `answers` are
indices of `labels`: at the first token for a label of the whole text, at the first token of each word for tags.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from ctxprune.errors import UserError
from ctxprune.tasks.examples import Example, changed, held_out
from ctxprune.tasks.task import Split, TaskBatch, at_least, stream
from ctxprune.text.batches import IGNORED
from ctxprune.text.tokenizer import document_start_id, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMS = ("decoder", "encoder")


@dataclass
class Row:
    """One row as it grows; answers and questions stand where the logits that are about them do."""

    ids: list[int]
    answers: list[int]
    questions: list[int]
    context: int

    @classmethod
    def of(cls, context: list[int]) -> Row:
        """A row that is all context."""
        return cls(list(context), [IGNORED] * len(context), [-1] * len(context), len(context))

    def ask(self, prompt: list[int], answer: list[int], questions: list[int]) -> None:
        """Add tokens that ask and those that answer; each of the latter belongs to a number in `questions`."""
        self.ids += [*prompt, *answer]
        self.answers += [IGNORED] * (len(prompt) + len(answer))
        self.questions += [-1] * (len(prompt) + len(answer))
        begin, end = len(self.ids) - len(answer) - 1, len(self.ids) - 1
        self.answers[begin:end], self.questions[begin:end] = answer, questions


@dataclass(frozen=True)
class FileTask(ABC):
    """What tasks from files share. Subclasses say which examples a file holds and how a decoder is asked."""

    name: ClassVar[str]
    labels: ClassVar[tuple[str, ...]] = ()
    """Labels or tags, in the order of their indices; empty where the answer is free text."""

    file: str = ""
    """Path of the examples."""
    test_file: str = ""
    """Path of the test examples; empty: one text in 20 of `file` is for testing."""
    tokenizer: str = ""
    """Folder or hub id of the tokenizer."""
    form: str = "decoder"
    """decoder (prompt and answer) or encoder (text and labels)."""
    max_tokens: int = 256
    """Longest context in tokens; longer texts are cut, as are free answers at half of it."""

    def __post_init__(self):
        for field in ("file", "tokenizer"):
            if not getattr(self, field):
                raise UserError(f"{self.name}: {field} is empty: give a path")
        forms = FORMS if type(self).labels else FORMS[:1]  # of the class: some read theirs from the file, later
        if self.form not in forms:
            raise UserError(f"{self.name}: form is {self.form!r}: give {' or '.join(forms)}")
        at_least(self.name, 4, max_tokens=self.max_tokens)

    @property
    def vocab_size(self) -> int:
        """Every token id is below it."""
        return len(_tokenizer(self.tokenizer))

    def rows(self, split: Split) -> int:
        """How many different rows the split has."""
        return len(self._split(split))

    def batch(self, split: Split, seed: int, index: int, size: int) -> TaskBatch:
        """`size` examples, in another order for each (seed, epoch); an epoch visits each once, then the next begins."""
        stream(split, seed, index)  # says no to what is no split and no number
        examples = self._split(split)
        visits = index * size + np.arange(size)
        chosen = [
            examples[_order(split, seed, int(v) // len(examples), len(examples))[v % len(examples)]] for v in visits
        ]
        tokenizer = _tokenizer(self.tokenizer)
        if self.form == "encoder":
            return _batch([self._labelled(tokenizer, example) for example in chosen], _pad(tokenizer), left=False)
        return _batch([self._asked(tokenizer, example) for example in chosen], _pad(tokenizer), left=True)

    def files(self, file: str) -> list[str]:
        """Which files are read for `file`."""
        return [file]

    @abstractmethod
    def examples(self, file: str) -> Iterator[Example]:
        """The examples of a file; UserError, naming file and line, for a broken one."""

    @abstractmethod
    def questions(self, example: Example) -> Iterator[tuple[str, str]]:
        """What is asked after the context and how it is answered, as texts that are tokenised one by one."""

    def _split(self, split: Split) -> list[Example]:
        examples = _splits(self, changed(self.file), changed(self.test_file) if self.test_file else 0)[split]
        if not examples:
            raise UserError(f"{self.name}: {self.file!r} has too few examples for a {split} split: give more")
        return examples

    def _asked(self, tokenizer: PreTrainedTokenizerFast, example: Example) -> Row:
        encode = _encoder(tokenizer)
        row = Row.of([document_start_id(tokenizer), *encode(example.text)][: self.max_tokens])
        for number, (prompt, answer) in enumerate(islice(self.questions(example), self._asks(tokenizer, example))):
            ids = encode(answer)
            if self.labels:
                row.ask(encode(prompt), ids, [number] * len(ids))
            else:  # each token of a free text is a question: a row's score is its share of right tokens
                cut = ids[: self.max_tokens // 2]
                # A text that was cut does not end there.
                end = [] if tokenizer.eos_token_id is None or len(cut) < len(ids) else [tokenizer.eos_token_id]
                ids = [*cut, *end]
                row.ask(encode(prompt), ids, list(range(len(ids))))
        return row

    def _asks(self, tokenizer: PreTrainedTokenizerFast, example: Example) -> int | None:
        """How many words are asked about: those that the context holds whole, the first in any case; None: all."""
        if not example.words:
            return None
        plain = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        read = tokenizer(example.text, **plain)["offset_mapping"][: self.max_tokens - 1][-1][1]
        ends = accumulate(len(word) + 1 for word in example.words)  # each with the space behind it
        return max(1, sum(end - 1 <= read for end in ends))

    def _labelled(self, tokenizer: PreTrainedTokenizerFast, example: Example) -> Row:
        words = list(example.words) or [example.text]
        cut = {"truncation": True, "max_length": self.max_tokens}
        read = tokenizer(words, is_split_into_words=True, split_special_tokens=True, **cut)
        row = Row.of(read["input_ids"])
        if not example.words:
            row.answers[0], row.questions[0] = self.labels.index(example.label), 0
            return row
        word_of = read.word_ids()
        for position, word in enumerate(word_of):
            if word is not None and word not in word_of[:position]:
                row.answers[position], row.questions[position] = self.labels.index(example.tags[word]), word
        return row


@lru_cache(maxsize=8)
def _splits(task: FileTask, *changed: int) -> dict[Split, list[Example]]:
    """Read once for each state of the files."""
    return held_out(list(task.examples(task.file)), list(task.examples(task.test_file)) if task.test_file else None)


@lru_cache(maxsize=4)
def _tokenizer(folder_or_id: str) -> PreTrainedTokenizerFast:
    return load_tokenizer(folder_or_id)


@lru_cache(maxsize=8)
def _order(split: Split, seed: int, epoch: int, count: int) -> np.ndarray:
    return stream(split, seed, epoch).permutation(count)


def _encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], list[int]]:
    # Text that spells a special token stays text.
    return lambda text: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _pad(tokenizer: PreTrainedTokenizerFast) -> int:
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None), 0)


def _batch(rows: list[Row], pad: int, left: bool) -> TaskBatch:
    """Rows of several lengths, padded."""
    n = max(len(row.ids) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        out = torch.full((len(rows), n), fill)
        for index, row in enumerate(rows):
            values = torch.tensor(getattr(row, name))
            place = slice(n - len(values), n) if left else slice(len(values))
            out[index, place] = values
        return out

    lengths = torch.tensor([len(row.ids) for row in rows])
    column, context = torch.arange(n), torch.tensor([row.context for row in rows])
    mask = (column >= n - lengths[:, None]) if left else (column < lengths[:, None])
    return TaskBatch(
        padded("ids", pad),
        padded("answers", IGNORED),
        padded("questions", -1),
        context + n - lengths if left else context,
        attention_mask=mask.long(),
    )
