"""Are entities counted whole, by kind, and nothing else?"""

from __future__ import annotations

import math

from ctxprune.tasks.entities import entities, entity_f1


def test_entities_of_a_sentence():
    tags = ["B-person", "I-person", "O", "B-location", "B-location", "I-person", "I-person"]
    assert entities(tags) == {("person", 0, 2), ("location", 3, 4), ("location", 4, 5), ("person", 5, 7)}
    assert entities(["O", "O"]) == entities([]) == set()
    assert entities(["B-creative-work"]) == {("creative-work", 0, 1)}


def test_half_an_entity_is_none():
    true = [["B-person", "I-person", "O"], ["B-group"]]
    assert entity_f1(true, true) == 1
    assert entity_f1([["B-person", "O", "O"], ["B-group"]], true) == 0.5
    assert entity_f1([["O", "O", "O"], ["B-person"]], true) == 0
    # One of two found, nothing false: precision 1, recall 1/2.
    assert math.isclose(entity_f1([["O", "O", "O"], ["B-group"]], true), 2 / 3)
    assert math.isnan(entity_f1([["O"]], [["O"]]))
