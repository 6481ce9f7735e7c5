"""How are names in text found and counted? Sentences joined into full rows, each judged once and whole, and F1 over
entities with an interval over rows.

A sentence that a row cannot hold whole fills the row up, unjudged, and opens the next one. Only the first token of each
word is asked for its tag.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ctxprune.errors import UserError
from ctxprune.tasks.entities import entities
from ctxprune.tasks.examples import Example
from ctxprune.text.batches import IGNORED
from ctxprune.text.tokenizer import document_start_id

RESAMPLES = 2000
"""Draws of the bootstrap."""
Sentence = tuple[list[int], list[int]]
"""Token ids, the opening one first, and as many tag indices: IGNORED but at the first token of each word."""


def encoded(tokenizer, examples: Sequence[Example], labels: list[str]) -> list[Sentence]:
    """Each example as a sentence; UserError for a word that is no token."""
    words = sorted({word for example in examples for word in example.words})
    given = [f" {word}" for word in words]
    told = tokenizer(given, add_special_tokens=False, split_special_tokens=True)["input_ids"] if given else []
    pieces, start = dict(zip(words, told, strict=True)), document_start_id(tokenizer)
    if empty := [word for word in words if not pieces[word]]:
        raise UserError(f"the tokenizer makes no token of the word {empty[0]!r}: take another, or leave it empty")
    found = []
    for example in examples:
        ids, tags = [start], [IGNORED]
        for word, tag in zip(example.words, example.tags, strict=True):
            ids += pieces[word]
            tags += [labels.index(tag), *[IGNORED] * (len(pieces[word]) - 1)]
        found.append((ids, tags))
    return found


def joined(sentences: Sequence[Sentence], tokens: int) -> tuple[Tensor, Tensor, int]:
    """Ids and tags, each [rows, tokens], and how many sentences are longer than a row and left out."""
    fits = [one for one in sentences if len(one[0]) <= tokens]
    rows: list[Sentence] = []
    ids: list[int] = []
    tags: list[int] = []
    for more, told in fits:
        if len(ids) + len(more) > tokens:
            rows.append((ids + more[: tokens - len(ids)], tags + [IGNORED] * (tokens - len(ids))))
            ids, tags = [], []
        ids, tags = ids + more, tags + told
    place = 0
    while ids and len(ids) < tokens:  # the last row: begun again, unjudged
        ids = (ids + fits[place % len(fits)][0])[:tokens]
        place += 1
    rows += [(ids, tags + [IGNORED] * (tokens - len(tags)))] if ids else []
    first, second = (torch.tensor([row[part] for row in rows]).int().view(-1, tokens) for part in (0, 1))
    return first, second, len(sentences) - len(fits)


def counted(
    ids: Int64[Tensor, " tokens"], true: Int64[Tensor, " tokens"], said: Int64[Tensor, " read"], labels: list[str]
) -> list[int]:
    """Of one row: entities found, said and true; words tagged rightly, and words. What was not read is said to be O."""
    start, both, mine, theirs, right, words = int(ids[0]), 0, 0, 0, 0, 0
    begins = [*(ids == start).nonzero()[:, 0].tolist(), len(ids)]
    for begin, end in pairwise(begins):
        asked = [place for place in range(begin, end) if true[place] != IGNORED]
        told = [labels[int(said[place])] if place < len(said) else "O" for place in asked]
        wanted = [labels[int(true[place])] for place in asked]
        found, there = entities(told), entities(wanted)
        both, mine, theirs = both + len(found & there), mine + len(found), theirs + len(there)
        right += sum(a == b for a, b in zip(told, wanted, strict=True))
        words += len(asked)
    return [both, mine, theirs, right, words]


def f1(counts: Float[Tensor, "*draws rows 5"]) -> Float[Tensor, "*draws"]:
    """Micro-averaged F1 of the entities of these rows, 0 to 1; 0 where neither side has any."""
    both, mine, theirs = counts[..., :3].double().sum(-2).unbind(-1)
    return 2 * both / (mine + theirs).clamp(min=1)


def bootstrap(a: Float[Tensor, "rows 5"], b: Float[Tensor, "rows 5"], seed: int = 0) -> tuple[float, float, float]:
    """(F1 of a over that of b, as a difference, and its 95 % interval): `counted` of the same rows, in one order.

    Percentile bootstrap (Efron 1979) over rows, each draw the same of both sides.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(a), (RESAMPLES, len(a)), generator=generator)
    edges = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(f1(a[drawn]) - f1(b[drawn]), edges).tolist()
    return (f1(a) - f1(b)).item(), low, high


def named(tags: Int64[Tensor, "rows tokens"], labels: list[str]) -> bool:
    """Whether any word is (part of) a name: without one there is no F1."""
    names = [index for index, label in enumerate(labels) if label != "O"]
    return bool(torch.isin(tags, torch.tensor(names)).any())


def checked(file: str, examples: Sequence[Example]) -> list[str]:
    """The tags of a file that is trained on, sorted; UserError where they are not those of entities."""
    labels = sorted({tag for example in examples for tag in example.tags})
    for tag in labels:
        if tag != "O" and (tag[:2] not in ("B-", "I-") or len(tag) < 3):
            raise UserError(f"{file}: the tag {tag!r} is neither O nor B-kind nor I-kind: mend it")
    if len(labels) < 2 or labels == ["O"]:
        raise UserError(f"{file}: every word has the tag {labels[0]!r}; give names and other words")
    return labels
