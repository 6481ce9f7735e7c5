"""Do the examples of a file come out as they went in, for decoders and for encoders, and is every mistake named?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, PreTrainedTokenizerFast

from ctxprune.tasks import from_dict
from ctxprune.tasks.scoring import in_context, loss, score
from ctxprune.tasks.task import SPLITS
from ctxprune.text.batches import IGNORED
from ctxprune.text.tokenizer import load_tokenizer, train_tokenizer

SENTENCES = [f"film number {number} is {'good' if number % 3 else 'bad, truly bad'}" for number in range(120)]
TOPICS = ["World", "Sports", "Business", "Sci/Tech"]


def write_files(folder: Path) -> dict[str, dict[str, object]]:
    """A small file of each kind; what a task of each name is given."""
    lines = [f"{text}\t{int(number % 3 > 0)}" for number, text in enumerate(SENTENCES)]
    (folder / "sst2.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    lines = [f"{text}\t{TOPICS[number % 4]}" for number, text in enumerate(SENTENCES)]
    (folder / "agnews.tsv").write_text("\r\n".join(lines), encoding="utf-8")
    words = [
        f"Ms\tO\n{name}\tB-person\nLee{number}\tI-person\nleft\tO\n" for number, name in enumerate(["Ann", "Bo"] * 60)
    ]
    (folder / "wnut17.conll").write_text("\t\n".join(words), encoding="utf-8")
    rows = [
        {"dialogue": f"#1: {text}?\n#2: yes", "summary": f"they saw {number}"} for number, text in enumerate(SENTENCES)
    ]
    (folder / "dialogsum.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "captions.en").write_text("\n".join(SENTENCES) + "\n", encoding="utf-8")
    (folder / "captions.de").write_text("\n".join(f"über {text}" for text in SENTENCES) + "\n", encoding="utf-8")
    train_tokenizer(SENTENCES, 400).save_pretrained(folder / "decoder")
    word_pieces(folder / "encoder")
    files = {"sst2": "sst2.tsv", "agnews": "agnews.tsv", "wnut17": "wnut17.conll", "dialogsum": "dialogsum.jsonl"}
    files |= {"multi30k": "captions.en", "classes": "agnews.tsv"}
    return {
        name: {"task": name, "file": str(folder / file), "tokenizer": str(folder / "decoder")}
        for name, file in files.items()
    }


def word_pieces(folder: Path) -> None:
    """A tokenizer as BERT's: pieces of words between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = [chr(code) for code in range(33, 127)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "film", "number", "is", "good", *letters, *("##" + x for x in letters)]
    backend = Tokenizer(models.WordPiece({word: index for index, word in enumerate(vocab)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $0 [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("tasks"))


ANSWERS = {
    "sst2": ("\nSentiment:", {" positive", " negative"}),
    "agnews": ("\nTopic:", {" " + topic for topic in TOPICS}),
    "classes": ("\nLabel:", {" " + topic for topic in TOPICS}),
    "wnut17": ("\nTags:\nMs =", None),
    "dialogsum": ("\nSummary:", None),
    "multi30k": ("\nTranslation:", None),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_decoder_reads_context_then_question_and_must_say_the_answer(given, name):
    task, tokenizer = from_dict(given[name]), load_tokenizer(given[name]["tokenizer"])
    batch = task.batch("train", 0, 0, 6)
    prompt, answers = ANSWERS[name]
    assert (batch.attention_mask[:, -1] == 1).all() and batch.input_ids.max() < task.vocab_size
    for row in range(6):
        context = tokenizer.decode(batch.input_ids[row][in_context(batch)[row]])
        rest = tokenizer.decode(batch.input_ids[row, int(batch.context_end[row]) :])
        assert context.startswith("<|endoftext|>") and rest.startswith(prompt)
        asked = (batch.answers[row] != IGNORED).nonzero()[:, 0]
        assert (asked >= batch.context_end[row]).all()
        # Teacher forcing: what must be said at a position stands right after it.
        assert torch.equal(batch.input_ids[row, asked + 1], batch.answers[row, asked])
        said = tokenizer.decode(batch.answers[row, asked])
        if answers:
            assert said in answers and rest == prompt + said
            number = SENTENCES.index(context.removeprefix("<|endoftext|>"))
            assert said == (" positive" if number % 3 else " negative") if name == "sst2" else " " + TOPICS[number % 4]


def test_free_text_counts_token_by_token_and_a_label_as_a_whole(given):
    summary = from_dict(given["dialogsum"]).batch("train", 0, 0, 1)
    assert summary.questions[0][summary.questions[0] >= 0].tolist() == list(
        range((summary.answers[0] != IGNORED).sum())
    )
    tokenizer = load_tokenizer(given["dialogsum"]["tokenizer"])
    assert summary.answers[0, -2] == tokenizer.eos_token_id  # the end is to be said too
    topic = from_dict(given["agnews"]).batch("train", 0, 0, 1)
    assert set(topic.questions[0].tolist()) == {-1, 0} and (topic.questions[0] == 0).sum() > 1
    tags = from_dict(given["wnut17"]).batch("train", 0, 0, 1)
    assert set(tags.questions[0].tolist()) == {-1, 0, 1, 2, 3}


def test_a_word_that_was_cut_is_not_asked_about_and_a_cut_answer_has_no_end(given):
    tokenizer = load_tokenizer(given["wnut17"]["tokenizer"])
    tags = from_dict({**given["wnut17"], "max_tokens": 6}).batch("train", 0, 0, 8)
    for row in range(8):
        read = tokenizer.decode(tags.input_ids[row][in_context(tags)[row]]).removeprefix("<|endoftext|>").split(" ")
        asked = tokenizer.decode(tags.input_ids[row, int(tags.context_end[row]) :])
        assert asked.count(" =") == tags.questions[row].max() + 1 < 4
        assert f"{read[0]} =" in asked and "left =" not in asked
    whole = from_dict(given["dialogsum"]).batch("train", 0, 0, 1)
    length = int((whole.answers[0] != IGNORED).sum())
    cut = from_dict({**given["dialogsum"], "max_tokens": 2 * (length - 2)}).batch("train", 0, 0, 1)
    said = cut.answers[0][cut.answers[0] != IGNORED]
    assert len(said) == length - 2 and tokenizer.eos_token_id not in said.tolist()


def test_an_encoder_is_asked_for_labels_where_its_head_reads_them(given):
    base = {"form": "encoder", "tokenizer": str(Path(given["sst2"]["tokenizer"]).with_name("encoder"))}
    sentiment = from_dict({**given["sst2"], **base})
    batch = sentiment.batch("train", 0, 0, 5)
    assert (batch.attention_mask[:, 0] == 1).all() and (batch.input_ids[:, 0] == 2).all()
    assert (batch.answers[:, 1:] == IGNORED).all() and set(batch.answers[:, 0].tolist()) == {0, 1}
    assert torch.equal(batch.context_end, batch.attention_mask.sum(1))
    shape = {"vocab_size": sentiment.vocab_size, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**shape, intermediate_size=16, num_labels=2)
    logits = BertForSequenceClassification(config).eval()(batch.input_ids, attention_mask=batch.attention_mask).logits
    everywhere = logits[:, None].expand(-1, batch.input_ids.shape[1], -1)
    assert torch.equal(score(everywhere, batch), (logits.argmax(-1) == batch.answers[:, 0]).float())
    tags = from_dict({**given["wnut17"], **base})
    batch = tags.batch("train", 0, 0, 5)
    for row in range(5):
        said = [tags.labels[index] for index in batch.answers[row][batch.questions[row] >= 0].tolist()]
        assert said == ["O", "B-person", "I-person", "O"]
        starts = (batch.questions[row] == 2).nonzero().item()  # Lee17 is several pieces; its first one is asked
        assert batch.questions[row, starts + 1] == -1 and batch.attention_mask[row, starts + 1] == 1
    config = BertConfig(**shape, intermediate_size=16, num_labels=len(tags.labels))
    logits = BertForTokenClassification(config).eval()(batch.input_ids, attention_mask=batch.attention_mask).logits
    assert loss(logits, batch).isfinite()


@pytest.mark.parametrize("name", ANSWERS)
def test_batches_are_a_pure_function_and_splits_share_nothing(given, name):
    task = from_dict(given[name])
    first = task.batch("train", 3, 1, 4)
    assert torch.equal(first.input_ids, task.batch("train", 3, 1, 4).input_ids)
    assert not torch.equal(first.input_ids, task.batch("train", 4, 1, 4).input_ids)
    texts = {split: contexts(task, split) for split in SPLITS}
    assert all(len(set(texts[split])) == task.rows(split) for split in SPLITS)
    assert not set(texts["train"]) & set(texts["test"]) and not set(texts["validation"]) & set(texts["test"])
    assert sum(map(task.rows, SPLITS)) == 120


def contexts(task, split) -> list[tuple[int, ...]]:
    """The contexts of one epoch."""
    batch = task.batch(split, 0, 0, task.rows(split))
    return [tuple(row[inside].tolist()) for row, inside in zip(batch.input_ids, in_context(batch), strict=True)]


def test_an_epoch_visits_every_example_once_whatever_the_size_of_its_batches(given):
    task = from_dict(given["sst2"])
    rows = task.rows("train")
    whole = task.batch("train", 0, 0, 2 * rows)
    visited = [tuple(row[row != 0].tolist()) for row in whole.input_ids]
    assert len(set(visited[:rows])) == rows and set(visited[:rows]) == set(visited[rows:])
    assert visited[:rows] != visited[rows:]
    parts = [task.batch("train", 0, index, 7).input_ids for index in range(4)]
    assert [tuple(row[row != 0].tolist()) for part in parts for row in part] == visited[:28]


def test_a_test_file_of_its_own_is_tested_whole_and_never_trained_on(given, tmp_path):
    (tmp_path / "dev.tsv").write_text(f"{SENTENCES[0]}\t0\nnew\t1\n")
    task = from_dict({**given["sst2"], "test_file": str(tmp_path / "dev.tsv")})
    assert task.rows("test") == 2 and task.rows("train") + task.rows("validation") == 119
    assert not set(contexts(task, "test")) & set(contexts(task, "train"))


def test_a_file_that_changed_is_read_again(given, tmp_path):
    (tmp_path / "a.tsv").write_text("\n".join(f"{text}\t1" for text in SENTENCES))
    task = from_dict({**given["sst2"], "file": str(tmp_path / "a.tsv")})
    before = task.rows("train")
    (tmp_path / "a.tsv").write_text("\n".join(f"{text}\t1" for text in SENTENCES[:60]))
    assert task.rows("train") < before


def test_long_texts_are_cut_before_the_question(given):
    task = from_dict({**given["dialogsum"], "max_tokens": 8})
    batch = task.batch("train", 0, 0, 4)
    assert (in_context(batch).sum(1) == 8).all()


@pytest.mark.parametrize("form, spelled", [("decoder", "<|endoftext|>"), ("encoder", "[SEP]")])
def test_text_that_spells_a_special_token_stays_text(given, tmp_path, form, spelled):
    (tmp_path / "a.tsv").write_text("\n".join(f"{text} {spelled} x\t1" for text in SENTENCES))
    tokenizer = Path(given["sst2"]["tokenizer"]).with_name(form)
    batch = from_dict(
        {"task": "sst2", "file": str(tmp_path / "a.tsv"), "tokenizer": str(tokenizer), "form": form}
    ).batch("train", 0, 0, 4)
    special = load_tokenizer(str(tokenizer)).convert_tokens_to_ids(spelled)
    assert ((batch.input_ids == special) & batch.attention_mask.bool()).sum(1).tolist() == [1] * 4  # its own one alone


def test_a_data_set_folder_is_read_by_the_datasets_library(given, tmp_path):
    rows = [{"sentence": text, "label": number % 2} for number, text in enumerate(SENTENCES)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = from_dict({**given["sst2"], "file": str(tmp_path)})
    assert sum(map(task.rows, SPLITS)) == 120
