"""Are names in joined sentences found, counted whole and once, and compared fairly under hidden-state pruning?"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification

from ctxprune.errors import UserError
from ctxprune.tasks.entities import entity_f1
from ctxprune.tasks.examples import Example
from ctxprune.text.batches import IGNORED
from ctxprune.text.tokenizer import train_tokenizer
from pipelines import __main__, output
from pipelines.benchmark_config import HiddenConfig
from pipelines.hidden_benchmark import training
from pipelines.hidden_benchmark.entities import bootstrap, counted, encoded, f1, joined
from pipelines.hidden_benchmark.rows import rows_of

SIZES = {
    "task": "entities", "tokens": 64, "vocab": 300, "layers": 2, "width": 32, "heads": 2, "keep": [1.0, 0.5],
    "base_tokens": 32, "base_steps": 80, "base_batch": 16, "base_learning_rate": 5e-3, "steps": 4, "batch": 4,
    "asked": 8, "batches": [1],
}  # fmt: skip
WORDS = ["benchmark", "target=hidden", *(f"hidden.{name}={value}".replace(" ", "") for name, value in SIZES.items())]
LABELS = ["B-person", "I-person", "O"]


def sentences(count: int, seed: int) -> str:
    draw, blocks = random.Random(seed), []
    for _ in range(count):
        words = [(draw.choice(["sees", "the", "and", "ship"]), "O") for _ in range(draw.randint(3, 8))]
        words.insert(draw.randrange(len(words)), ("Ada", "B-person"))
        words.append(("Bob", "B-person"))
        blocks.append("".join(f"{word}\t{tag}\n" for word, tag in words))
    return "\n".join(blocks)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with files to learn from; fd 1 and the loggers stay as pytest has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "take_stdout", lambda: None)
    monkeypatch.setattr(output, "set_up_logging", lambda: None)
    Path("train.conll").write_text(sentences(150, 0))
    Path("test.conll").write_text(sentences(40, 1))
    return tmp_path


FILES = ["hidden.train_file=train.conll", "hidden.test_file=test.conll"]


def test_names_are_judged_by_f1_beside_words_and_timed(here, capsys):
    assert __main__.main([*WORDS, *FILES, "format=json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert records[0]["labels"] == ["B-person", "O"] and 0.5 < records[0]["most_frequent"] < 1
    judged = {record["method"]: record for record in records if record["table"] == "accuracy"}
    assert judged["dense"]["f1"] > 0.9 and judged["dense"]["accuracy"] > 0.9 and judged["dense"]["against_dense"] == 0
    for record in judged.values():
        assert record["against_dense"] == pytest.approx(record["f1"] - judged["dense"]["f1"], abs=1e-6)
        assert record["against_dense_low"] <= record["against_dense"] <= record["against_dense_high"]
    assert judged["truncated"]["f1"] < judged["dense"]["f1"], "what is not read is not found"
    assert {record["method"] for record in records if record["table"] == "prefill"} == set(judged)
    assert __main__.main([*WORDS, *FILES]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 tags, ") and "F1   words  points" in printed


def test_each_sentence_is_judged_once_and_whole():
    told = [([0, *range(1, n)], [IGNORED, *range(1, n)]) for n in (4, 5, 3, 30, 6)]
    ids, tags, left_out = joined(told, 8)
    assert left_out == 1 and ids.shape == tags.shape == (3, 8)
    assert ids.tolist()[:2] == [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert tags.tolist()[0] == [IGNORED, 1, 2, 3, *[IGNORED] * 4]
    assert ids.tolist()[2] == [0, 1, 2, 3, 4, 5, 0, 1], "the last row is filled up"
    assert sorted(tags[tags != IGNORED].tolist()) == sorted(tag for n in (4, 5, 3, 6) for tag in range(1, n))
    assert joined([], 8)[0].shape == (0, 8)


def test_the_first_token_of_a_word_has_its_tag():
    tokenizer = train_tokenizer(["a b"], 257)
    ((ids, tags),) = encoded(tokenizer, [Example("ab c", "", ("ab", "c"), ("B-person", "O"))], LABELS)
    assert tokenizer.decode(ids[1:]) == " ab c"
    assert tags == [IGNORED, 0, IGNORED, IGNORED, 2, IGNORED]


def test_counts_are_those_of_sentences_and_the_unread_is_no_name():
    ids, true = torch.tensor([9, 1, 2, 9, 3, 4]), torch.tensor([IGNORED, 2, 0, IGNORED, 1, 2])
    assert counted(ids, true, torch.tensor([2, 2, 0, 2, 1, 2]), LABELS) == [2, 2, 2, 4, 4]
    assert counted(ids, true, torch.tensor([2, 2, 0]), LABELS) == [1, 1, 2, 3, 4]
    said, wanted = [["O", "B-person"], ["O", "O"]], [["O", "B-person"], ["I-person", "O"]]
    counts = counted(ids, true, torch.tensor([2, 2, 0, 2, 2, 2]), LABELS)
    assert entity_f1(said, wanted) == pytest.approx(2 / 3)
    assert f1(torch.tensor([counts]).float()).item() == pytest.approx(2 / 3)
    assert f1(torch.zeros(3, 5)).item() == 0


def test_f1_is_compared_on_the_same_rows():
    one = torch.tensor([[1.0, 1, 1, 4, 4]] * 50 + [[0.0, 1, 1, 2, 4]] * 50)
    assert bootstrap(one, one) == (0.0, 0.0, 0.0)
    better = one.clone()
    better[50:70, 0] = 1
    difference, low, high = bootstrap(better, one)
    assert difference == pytest.approx(0.2) and 0.1 < low < 0.2 < high < 0.3


def test_pieces_and_short_rows_take_their_tags_along(here):
    settings = HiddenConfig(train_file="train.conll", test_file="test.conll", **SIZES)
    rows = rows_of(here / "store", settings)
    ids, positions, tags = training.pieces(settings, rows, 0)
    assert ids.shape == positions.shape == tags.shape == (16, 32)
    assert (tags != IGNORED).any() and (tags[:, 0] == IGNORED).all()
    whole = [training.whole(settings, rows, 0, tokens) for tokens in (64, 9)]
    assert torch.equal(whole[0][2][:, :9], whole[1][2]) and torch.equal(whole[0][0][:, :9], whole[1][0])


MISTAKES = [
    ("a\tB-person\n\nb\tS-person\n", "the tag 'S-person' is neither O nor B-kind nor I-kind"),
    ("a\tO\nb\tO\n", "every word has the tag 'O'"),
    ("a B-person\n", "line 1 is not a word, a tab and a tag"),
    ("".join(f"w{n}\tB-person\nx\tO\n\n" for n in range(20)), "no sentence to train on fits hidden.tokens=8"),
]


def test_a_split_without_names_has_no_f1(here):
    Path("test.conll").write_text("the\tO\nship\tO\n")
    settings = HiddenConfig(train_file="train.conll", test_file="test.conll", **SIZES)
    with pytest.raises(UserError, match="no sentence of the test split has a name"):
        rows_of(here / "store", settings)


@pytest.mark.parametrize(("text", "expected"), MISTAKES, ids=[expected[:20] for _, expected in MISTAKES])
def test_a_mistake_is_one_line_before_any_training(here, monkeypatch, text, expected):
    if "fits" in expected:
        text = text.replace("x\tO\n", "averyverylongword\tO\n")
    Path("train.conll").write_text(text)
    settings = HiddenConfig(train_file="train.conll", **(SIZES | {"tokens": 8, "vocab": 257}))
    with pytest.raises(UserError, match=expected.replace("'", ".")) as caught:
        rows_of(here / "store", settings)
    assert "\n" not in str(caught.value)


def test_a_batch_without_a_tag_that_counts_has_a_loss_all_the_same():
    shape = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = BertForTokenClassification(BertConfig(**shape, num_attention_heads=2, num_labels=3))
    ids = torch.randint(0, 20, (2, 8))
    tags = [torch.full((2, 8), IGNORED), torch.randint(0, 3, (2, 8))]
    losses = training.train(model, lambda step: (ids, None, tags[step]), 2, 1e-3, lambda *_: None)
    assert losses[0] == 0.0 and 0.0 < losses[1] < 10.0
