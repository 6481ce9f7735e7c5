"""Were the names found, whole and of the right kind? F1 over entities: most words are none, and accuracy hides that."""

from __future__ import annotations

from collections.abc import Sequence


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first word, word after the last) of each entity of a sentence in BIO tags.

    An I- that continues nothing of its kind opens an entity, as conlleval counts it (Tjong Kim Sang, CoNLL-2000).
    """
    found, kind, begin = set(), "", 0
    for place, tag in enumerate([*tags, "O"]):
        part, _, of = tag.partition("-")
        if kind and (part != "I" or of != kind):
            found.add((kind, begin, place))
            kind = ""
        if part in ("B", "I") and not kind:
            kind, begin = of, place
    return found


def entity_f1(said: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> float:
    """Micro-averaged F1 of the entities in sentences of tags, 0 to 1; NaN where neither side has any.

    said, true: one tag per word and one sequence per sentence, in the same order.
    """
    pairs = [(entities(mine), entities(theirs)) for mine, theirs in zip(said, true, strict=True)]
    found = sum(len(mine) + len(theirs) for mine, theirs in pairs)
    return 2 * sum(len(mine & theirs) for mine, theirs in pairs) / found if found else float("nan")
