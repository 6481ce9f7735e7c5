"""Is hidden-state pruning measured fairly: equal rows, steps and FLOPs, paired figures, a person's files checked?"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForTokenClassification

from ctxprune.errors import UserError
from ctxprune.hidden_pruning import pruning_of
from ctxprune.text.tokenizer import train_tokenizer
from pipelines import __main__, hidden_benchmark, output
from pipelines.benchmark_config import HiddenConfig
from pipelines.compose import compose
from pipelines.hidden_benchmark import clock, training
from pipelines.hidden_benchmark.clock import Passes
from pipelines.hidden_benchmark.flops import kept_tokens, pass_flops, truncated_tokens
from pipelines.hidden_benchmark.method import methods
from pipelines.hidden_benchmark.rows import Rows, rows_of

MATH = torch.nn.attention.SDPBackend.MATH
"""Attention as two products, which torch counts."""
KEEP = [1.0, 0.4]
SIZES = {
    "tokens": 64, "vocab": 300, "layers": 2, "width": 32, "heads": 2, "keep": KEEP, "base_tokens": 16,
    "base_steps": 60, "base_batch": 16, "base_learning_rate": 3e-3, "steps": 4, "batch": 4, "asked": 8,
    "batches": [1, 2],
}  # fmt: skip
WORDS = ["benchmark", "target=hidden", *(f"hidden.{name}={value}".replace(" ", "") for name, value in SIZES.items())]
NAMES = ["dense", "pruned", "truncated", "random score", "norm score", "not trained under it"]
VOICES = {"sea": "ship sail wave salt", "town": "street lamp crowd tram", "farm": "field cow plough hay"}


def texts(rows: int, seed: int, words: int = 90) -> list[str]:
    """Lines of text, tab, label; each label has words of its own among those of all."""
    draw, lines = random.Random(seed), []
    for row in range(rows):
        label = list(VOICES)[row % len(VOICES)]
        own = VOICES[label].split()
        lines.append(" ".join(draw.choice([*own, "the", "and", "of"]) for _ in range(words)) + f"\t{label}")
    return lines


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with files to learn from; fd 1 and the loggers stay as pytest has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "take_stdout", lambda: None)
    monkeypatch.setattr(output, "set_up_logging", lambda: None)
    Path("train.tsv").write_text("\n".join([*texts(120, 0), "too short\tsea"]) + "\n")
    Path("test.tsv").write_text("\n".join(texts(30, 1)) + "\n")
    return tmp_path


FILES = ["hidden.train_file=train.tsv", "hidden.test_file=test.tsv"]


def run(words: list[str], capsys) -> tuple[int, list[dict]]:
    code = __main__.main([*WORDS, *words, "format=json"])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def settings(**changes) -> HiddenConfig:
    return HiddenConfig(train_file="train.tsv", test_file="test.tsv", **(SIZES | changes))


def drawn(tokens: int = 64, rows: int = 10) -> Rows:
    """Rows whose every token tells its row and its place."""
    ids = torch.arange(rows * tokens).view(rows, tokens)
    classes = torch.arange(rows)
    splits = ("train", "validation", "test")
    return Rows(
        dict.fromkeys(splits, ids), dict.fromkeys(splits, classes), list("abcdefghij"), rows * tokens, {}, {"rows": 1}
    )


def test_every_method_is_judged_and_timed_and_a_second_start_trains_nothing(here, capsys, monkeypatch):
    code, records = run(FILES, capsys)
    assert code == 0 and {record["kind"] for record in records} == {"hidden"}
    assert records[0]["settings"]["train_file"] == "train.tsv" and records[0]["machine"]["cores"] >= 1
    (data,) = (record for record in records if record["table"] == "data")
    assert data["labels"] == ["farm", "sea", "town"] and data["left_out"]["train"] == 1
    assert data["rows"]["test"] == 30 and data["rows"]["train"] + data["rows"]["validation"] == 120
    assert data["most_frequent"] == pytest.approx(1 / 3)
    judged = {record["method"]: record for record in records if record["table"] == "accuracy"}
    assert list(judged) == NAMES
    assert judged["dense"]["accuracy"] > 0.9 and judged["dense"]["against_dense"] == 0.0
    for record in judged.values():
        difference = record["accuracy"] - judged["dense"]["accuracy"]
        assert record["against_dense"] == pytest.approx(difference, abs=1e-6) and record["judged_rows"] == 30
        assert record["against_dense_low"] <= record["against_dense"] <= record["against_dense_high"]
    assert judged["pruned"]["kept"] == judged["norm score"]["kept"] == [64, 26]
    assert judged["truncated"]["flops"] >= judged["pruned"]["flops"] > judged["norm score"]["flops"]
    timed = [record for record in records if record["table"] == "prefill"]
    assert [(record["batch"], record["method"]) for record in timed] == [(b, name) for b in (1, 2) for name in NAMES]
    for record in timed:
        (low, high), decides = record["speedup_spread"], record["method"] not in ("dense", "truncated")
        assert 0 < low <= record["speedup"] <= high and record["rounds"] == 3
        assert (0 < record["deciding_ms"] < record["prefill_ms"]) is decides
        assert record["kept"] == judged[record["method"]]["kept"]
    assert timed[0]["speedup_spread"] == [1.0, 1.0]

    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(training, "judged", lambda *_: pytest.fail("judged again"))
    again = run(FILES, capsys)[1]
    assert [record for record in again if record["table"] == "accuracy"] == list(judged.values())


def test_people_read_a_line_per_record(here, capsys, caplog):
    with caplog.at_level("INFO"):
        assert __main__.main([*WORDS, *FILES, "hidden.base_steps=1", "hidden.steps=1", "hidden.batches=[2]"]) == 0
    printed = capsys.readouterr().out.splitlines()
    learned = float(printed[3].split()[1].rstrip("%")) > 34
    assert ("the dense model is no better than" in caplog.text) is (not learned)
    assert printed[0].startswith("3 classes, ") and "30 of the test split" in printed[0]
    assert [line[:22].strip() for line in printed[3:9]] == NAMES
    assert len(printed) == 3 + 2 * len(NAMES) and "x (" in printed[10] and "deciding" in printed[10]


def test_the_same_schedule_without_training_runs_on_the_weights_of_dense(here):
    chosen, rows = settings(base_steps=1, steps=2), drawn()
    dense, pruned, *_, untrained = methods(chosen)
    start = training.base(here, chosen, rows, lambda done: None)
    folders = [
        training.fine_tuned(here, chosen, rows, one, start, lambda done: None) for one in (dense, untrained, pruned)
    ]
    assert folders[0] == folders[1] != folders[2]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in folders[1:]]
    assert weights[0].keys() == weights[1].keys(), "kept under the names of the model's own checkpoint"
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert pruning_of(training.loaded(folders[1], untrained)).config == pruned.pruning


@pytest.mark.parametrize("score", ["attention", "random"])
def test_operations_are_those_that_torch_counts(score):
    chosen, rows = settings(), drawn()
    torch.manual_seed(0)
    model = BertForTokenClassification._from_config(
        training._config(chosen, rows), attn_implementation="sdpa", dtype=torch.float32
    ).eval()
    method = next(one for one in methods(chosen) if one.pruning and one.pruning.score == score)
    outside = 2 * chosen.tokens * chosen.width * len(rows.labels)  # the classifier
    for one, subject in ((methods(chosen)[0], model), (method, None)):
        subject = training.prune_hidden(model, one.pruning) if subject is None else subject
        with torch.no_grad(), FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel([MATH]):
            subject(input_ids=rows.ids["test"][:1])
        assert counter.get_total_flops() == one.flops + outside
    assert pruning_of(model).stats.tokens == method.kept


@pytest.mark.parametrize("tokens", [10, 64, 1000])
def test_kept_tokens_are_those_that_a_pass_keeps(tokens):
    chosen = settings(tokens=tokens, keep=[1.0, 0.31])
    pruned = methods(chosen)[1]
    assert pruned.kept == kept_tokens(pruned.pruning, tokens) == (tokens, -(-31 * tokens // 100))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.35, 0.77, 1.0])
@pytest.mark.parametrize("width", [8, 128])
def test_a_truncated_text_takes_the_operations_of_the_pruned_one_and_hardly_more(share, width):
    flops = round(share * pass_flops([512] * 3, width))
    cut = truncated_tokens(flops, 3, width, 512)
    assert pass_flops([cut] * 3, width) >= flops
    assert cut == 1 or pass_flops([cut - 1] * 3, width) < flops


def test_operations_by_hand():
    assert pass_flops([3], 2) == 3 * 24 * 4 + 4 * 9 * 2
    assert pass_flops([4, 2], 2, asked=3) - pass_flops([4, 2], 2) == 2 * 3 * 4 * 2
    assert pass_flops([4, 2], 2, asked=0) - pass_flops([4, 2], 2) == 2 * 4 * 4 * 2


def test_every_method_reads_the_same_rows_and_an_epoch_each_of_them_once():
    chosen, rows = settings(batch=4), drawn()
    steps = [training.whole(chosen, rows, step, 64) for step in range(5)]
    seen = torch.cat([classes for _, _, classes in steps]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    short, positions, classes = training.whole(chosen, rows, 3, 7)
    assert torch.equal(short, steps[3][0][:, :7]) and torch.equal(classes, steps[3][2]) and positions is None


def test_a_piece_knows_its_place_and_begins_as_its_row_does():
    chosen, rows = settings(base_batch=64), drawn()
    ids, positions, classes = training.pieces(chosen, rows, 0)
    assert ids.shape == positions.shape == (64, 16) and torch.equal(ids, rows.ids["train"][classes[:, None], positions])
    assert (positions[:, 0] == 0).all() and (positions[:, 2:] - positions[:, 1:-1] == 1).all()
    assert positions[:, 1].min() >= 1 and positions.max() <= 63 and len(positions[:, 1].unique()) > 10
    whole_rows = training.pieces(settings(base_tokens=64), rows, 0)
    assert torch.equal(whole_rows[0], rows.ids["train"][whole_rows[2]])


def test_a_row_is_classed_by_all_of_its_tokens(here):
    chosen, rows = settings(base_steps=1), drawn()
    start = training.base(here, chosen, rows, lambda done: None)
    for method in methods(chosen)[:2]:
        model = training.loaded(start, method)
        each = model(input_ids=rows.ids["test"]).logits
        right = (each.double().mean(1).argmax(-1) == rows.classes["test"]).float()
        assert each.shape == (10, 64, 10) and torch.equal(training.judged(model, rows, "test", 64, print), right)


def test_a_ratio_is_that_of_dense_in_the_same_round():
    passes = {
        "dense": Passes([1.0, 9.0, 2.0], [0.0] * 3, [(8, 8)] * 3),
        "pruned": Passes([0.5, 3.0, 2.0], [0.1, 0.2, 0.3], [(8, 4)] * 3),
    }
    told = clock.told(passes, "pruned")
    assert (told["speedup"], told["speedup_spread"], told["rounds"]) == (2.0, [1.0, 3.0], 3)
    assert told["prefill_ms"] == pytest.approx(2000) and told["kept"] == [8, 4]
    assert told["deciding_ms"] == pytest.approx(200) and told["deciding_share"] == pytest.approx(0.1)


def test_accuracy_is_compared_row_by_row(here):
    dense, pruned, *_ = methods(settings())
    (here / "training.json").write_text('{"loss": 0.5}')
    scores = {"dense": torch.ones(200), "pruned": torch.ones(200)}
    scores["pruned"][:20] = 0
    record = hidden_benchmark.judgement(pruned, dense, scores, here)
    assert record["accuracy"] == pytest.approx(0.9) and record["against_dense"] == pytest.approx(-0.1)
    assert -0.16 < record["against_dense_low"] < -0.1 < record["against_dense_high"] < -0.04
    scores["dense"] = scores["pruned"].clone()
    record = hidden_benchmark.judgement(pruned, dense, scores, here)
    assert record["against_dense_low"] == record["against_dense_high"] == 0.0, "the same rows, the same answers"


def test_without_a_test_file_no_text_is_in_two_splits(here):
    Path("train.tsv").write_text("\n".join(texts(200, 3)) + "\n")
    found = rows_of(here / "store", HiddenConfig(train_file="train.tsv", judged_on="validation", **SIZES))
    rows = [set(map(tuple, found.ids[split].tolist())) for split in ("train", "validation", "test")]
    assert sum(map(len, rows)) == 200 == len(set.union(*rows)) and min(map(len, rows)) >= 1


def test_a_tokenizer_of_the_persons_is_taken(here):
    tokenizer = train_tokenizer(["cow cow plough hay field"], 270)
    tokenizer.save_pretrained(here / "words")
    found = rows_of(here / "store", settings(tokenizer=str(here / "words"), tokens=70, base_tokens=16))
    assert found.vocab_size == len(tokenizer) and (found.ids["test"][:, 0] == tokenizer.bos_token_id).all()


def test_ids_of_a_tokenizer_may_have_holes(here):
    tokenizer = train_tokenizer(["cow cow plough hay field"], 270)
    tokenizer.save_pretrained(here / "words")
    path = here / "words" / "tokenizer.json"
    made = json.loads(path.read_text())
    word = max(made["model"]["vocab"], key=made["model"]["vocab"].get)
    made["model"]["vocab"][word] = 500
    path.write_text(json.dumps(made))
    found = rows_of(here / "store", settings(tokenizer=str(here / "words"), tokens=70, base_tokens=16))
    assert found.vocab_size == 501 > len(tokenizer)


MISTAKES = [
    ([], "benchmark target=hidden needs hidden.train_file=FILE"),
    (["hidden.train_file=nowhere.tsv"], "no such file; give lines of text, tab, label"),
    (["hidden.task=entities"], "needs hidden.train_file=FILE, lines of word, tab, tag"),
    (["hidden.task=entities", "hidden.train_file=nowhere.tsv"], "no such file; give lines of word, tab, tag"),
    (["hidden.train_file=unlabelled.tsv"], "line 2 is not a text, a tab and a label"),
    (["hidden.train_file=train.tsv", "hidden.test_file=other.tsv"], "has the label 'moon', which is none of farm, sea"),
    (["hidden.train_file=alone.tsv"], "every text has the label 'sea'; give two labels or more"),
    ([*FILES, "hidden.tokens=5000"], "no text labelled 'farm' to train on has hidden.tokens=5000 tokens"),
    (["hidden.train_file=train.tsv", "hidden.test_file=train.tsv"], "every text to learn from is a test as well"),
    (["hidden.train_file=train.tsv", "hidden.test_file=short.tsv"], "no text of the test split has hidden.tokens=64"),
    ([*FILES, "hidden.keep=[1.0,0.5,0.4]"], "hidden.keep has 3 entries and hidden.layers=2: give one per layer"),
    ([*FILES, "hidden.keep=[0.9,0.5]"], "begin with 1.0, never rise, and end below 1.0"),
    ([*FILES, "hidden.keep=[1.0,1.0]"], "begin with 1.0, never rise, and end below 1.0"),
    ([*FILES, "hidden.keep=[1.0,0.0]"], "hidden.keep=0.0: give a number in (0, 1]"),
    ([*FILES, "hidden.heads=3"], "hidden.heads=3 does not divide hidden.width=32"),
    ([*FILES, "hidden.base_tokens=65"], "hidden.base_tokens=65 is above hidden.tokens=64"),
    ([*FILES, "hidden.batches=[]"], "hidden.batches is empty"),
    ([*FILES, "hidden.steps=0"], "hidden.steps=0: give a whole number in [1, 10000000]"),
    ([*FILES, "hidden.judged_on=tset"], "hidden.judged_on=tset: choose one of test, validation"),
    ([*FILES, "hidden.kep=[1.0]"], 'no setting "hidden.kep"; nearest: hidden.keep'),
    ([*FILES, "checkpoint=."], "target=hidden trains models of its own: leave checkpoint out"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=[" ".join(words)[-40:] for words, _ in MISTAKES])
def test_a_mistake_is_one_line_before_any_training(here, capsys, monkeypatch, words, expected):
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained"))
    Path("unlabelled.tsv").write_text("a text\tsea\na text without a label\n")
    Path("other.tsv").write_text("a text\tmoon\n")
    Path("alone.tsv").write_text("a text\tsea\nanother\tsea\n")
    Path("short.tsv").write_text("a text\tsea\n")
    assert __main__.main([*WORDS, *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and expected in said.err


def test_files_are_found_from_where_the_person_stands(here):
    Path("a [b], c.tsv").write_text("x")
    config = compose("benchmark", ["target=hidden", "hidden.train_file=a [b], c.tsv", "hidden.tokenizer=owner/name"])
    assert config.hidden.train_file == str(here / "a [b], c.tsv") and config.hidden.tokenizer == "owner/name"
    with pytest.raises(UserError, match="which model"):
        compose("benchmark", FILES)
