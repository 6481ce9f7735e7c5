"""Does a file with a mistake answer in one line that names the file and the line?"""

from __future__ import annotations

import json

import pytest

from ctxprune.errors import UserError
from ctxprune.tasks import from_dict
from ctxprune.text.tokenizer import train_tokenizer

GOOD = json.dumps({"dialogue": "hello there", "summary": "hi"})


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("sst2", "sentence\tlabel\na film\t1\na film\n", "line 3 is not a text, a tab and a label"),
        ("sst2", "a film\t\n", "line 1 is not a text, a tab and a label"),
        ("sst2", "\t1\n", "line 1 is not a text, a tab and a label"),
        ("sst2", "good\t1\nbad\t2\n", "line 2 has the label '2', which is none of 0, 1"),
        ("sst2", "", "is empty: line 1 must hold an example"),
        ("sst2", "sentence\tlabel\n", "has too few examples for a train split"),
        ("sst2", b"good\t1\nb\xffd\t0\n", "line 2 is not UTF-8"),
        ("agnews", "news\tWeather\n", "line 1 has the label 'Weather', which is none of World, Sports"),
        ("classes", "review\tsentiment\nfine\tgood\nfair\tgood\n", "one text alone has the label 'sentiment'"),
        ("classes", "news\tWeather\nnews without one\n", "line 2 is not a text, a tab and a label"),
        ("wnut17", "Ann\tB-person\nleft\n", "line 2 is not a word, a tab and a tag"),
        ("wnut17", "Ann\tB-person\nleft\t\n", "line 2 is not a word, a tab and a tag"),
        ("wnut17", "Ann\tB-animal\n", "line 1 has the label 'B-animal', which is none of O, B-corporation"),
        ("wnut17", " \n", "is empty: line 1 must hold an example"),
        ("dialogsum", GOOD + "\n{\n", "line 2 is not JSON"),
        ("dialogsum", GOOD + '\n{"dialogue": "a"}\n', "line 2 has no text in 'summary'"),
        ("dialogsum", '{"dialogue": "", "summary": "b"}\n', "line 1 has no text in 'dialogue'"),
        ("dialogsum", "[1]\n", "line 1 has no text in 'dialogue'"),
    ],
)
def test_a_broken_file_names_its_line(tmp_path, name, text, says):
    file = tmp_path / "given.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(tmp_path, name, file, says)


def refused(tmp_path, name, file, says):
    train_tokenizer(["some text"], 300).save_pretrained(tmp_path / "tokenizer")
    task = from_dict({"task": name, "file": str(file), "tokenizer": str(tmp_path / "tokenizer")})
    with pytest.raises(UserError) as error:
        task.batch("train", 0, 0, 1)
    assert says in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_texts_that_are_not_parallel_are_refused(tmp_path):
    source, target = tmp_path / "a.en", tmp_path / "a.de"
    source.write_text("one\ntwo\nthree\n")
    target.write_text("eins\nzwei\n")
    refused(tmp_path, "multi30k", source, "they part at line 3")
    target.write_text("eins\n\ndrei\n")
    with pytest.raises(UserError, match=r"a\.de' line 2 is blank, its translation is not"):
        from_dict({"task": "multi30k", "file": str(source), "tokenizer": str(tmp_path / "tokenizer")}).rows("train")
    target.unlink()
    with pytest.raises(UserError, match=r"a\.de' can't be read \(No such file or directory\)"):
        from_dict({"task": "multi30k", "file": str(source), "tokenizer": str(tmp_path / "tokenizer")}).rows("train")


@pytest.mark.parametrize("name", ["sst2", "wnut17", "dialogsum"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    refused(tmp_path, name, tmp_path / "absent", "can't be read (No such file or directory)")


def test_a_folder_is_no_file_of_tags(tmp_path):
    refused(tmp_path, "wnut17", tmp_path, "can't be read (Is a directory)")


def test_a_data_set_without_the_column_is_refused(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a", "label": 1}\n')
    refused(tmp_path, "sst2", folder, "row 1 has no text in 'sentence' and 'label'")
    (folder / "train.jsonl").write_text('{"sentence": "a", "label": 7}\n')
    refused(tmp_path, "sst2", folder, "line 1 has the label '7'")
    (folder / "train.jsonl").unlink()
    refused(tmp_path, "sst2", folder, "does not load")
