"""Can texts with labels of one's own be studied, whatever these are called?"""

from __future__ import annotations

from pathlib import Path

import pytest

from ctxprune import UserError
from ctxprune.text.tokenizer import train_tokenizer
from pipelines.policy_study import texts
from pipelines.policy_study.texts import Texts
from tests.pipelines.policy_study.test_texts import lines, write


@pytest.fixture
def root(tmp_path) -> Path:
    """A store."""
    return tmp_path / "store"


def test_labels_of_ones_own_are_those_of_the_file(tmp_path, root):
    own = {"0": "dull", "1": "bright"}
    train, test = (
        write(tmp_path / name, [f"{line[:-1]}{own[line[-1]]}" for line in lines(rows, seed)])
        for name, rows, seed in (("train.tsv", 2600, 0), ("test.tsv", 130, 1))
    )
    task = Texts(str(root / texts.kept(root, "classes", train, test, rows=64)))
    batch = task.batch("test", 0, 0, 64)
    assert len(set(batch.answers[batch.answers >= 0].tolist())) == 2
    write(tmp_path / "test.tsv", ["some words\tdull", "some words\tbrown"])
    with pytest.raises(UserError, match="line 2 has the label 'brown', which is none of bright, dull"):
        texts.kept(root, "classes", train, test, rows=64)


def test_labels_that_begin_alike_have_tokens_of_their_own(tmp_path, root):
    tokenizer = train_tokenizer(["nothing of the kind"] * 4, 257)
    own = [len(tokenizer), len(tokenizer) + 1]
    assert texts.label_tokens(tokenizer, [" Sports", " Sci/Tech"]) == own
    apart = texts.label_tokens(tokenizer, ["Sports", "of"])
    assert len(set(apart)) == 2 and max(apart) < len(tokenizer)
    alike = {"0": "very dull", "1": "very bright"}
    file = write(tmp_path / "train.tsv", [f"{line[:-1]}{alike[line[-1]]}" for line in lines(2600, 0)])
    task = Texts(str(root / texts.kept(root, "classes", file, None, rows=64)))
    said = {token for token in task.batch("test", 0, 0, 64).answers.flatten().tolist() if token >= 0}
    assert said == {task.vocab_size - 2, task.vocab_size - 1}
