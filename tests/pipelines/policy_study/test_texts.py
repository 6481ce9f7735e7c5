"""Does a study read a person's labelled texts as it says: one length per batch, files told apart, mistakes refused?"""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from ctxprune.errors import UserError
from ctxprune.policies import DenseConfig
from ctxprune.retrofitting import retrofit
from ctxprune.tasks import SYNTHETIC, Task
from ctxprune.tasks.recall import RecallConfig
from ctxprune.text.batches import IGNORED
from pipelines import compose
from pipelines.policy_study import jobs, run, small_model, table, texts
from pipelines.policy_study.measure import measure
from pipelines.policy_study.methods import named, retrofitted
from pipelines.policy_study.texts import SHORTEST, STEP, WINDOW, Texts

VOICES = {"0": "dull slow poor", "1": "bright quick rich"}


def lines(rows: int, seed: int) -> list[str]:
    """Sentence, tab, label; each label has words of its own, and one of them comes first."""
    draw, made = random.Random(seed), []
    for row in range(rows):
        label = str(row % 2)
        own = VOICES[label].split()
        words = [own[0], *(draw.choice([*own, "the", "film", "of", "a"]) for _ in range(draw.randint(3, 60)))]
        made.append(" ".join(words) + f"\t{label}")
    return made


def write(path: Path, made: list[str]) -> str:
    path.write_text("\n".join(made) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    """A file to learn from and one to measure on."""
    folder = tmp_path_factory.mktemp("texts")
    return write(folder / "train.tsv", lines(2600, 0)), write(folder / "test.tsv", lines(260, 1))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A store."""
    return tmp_path_factory.mktemp("runs") / "store"


@pytest.fixture(scope="module")
def task(root, files) -> Texts:
    found = texts.restored(root, {"task": "sst2", "rows": texts.kept(root, "sst2", *files, rows=128)})
    assert isinstance(found, Texts) and isinstance(found, Task)
    return found


def held(task: Texts, split: str) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The texts of a split and their answers, in tokens."""
    tensors = texts._tensors(task.folder)

    def parts(name: str) -> list[tuple[int, ...]]:
        cut = np.split(tensors[f"{split}.{name}.ids"], tensors[f"{split}.{name}.begins"][1:])
        return [tuple(part.tolist()) for part in cut]

    return dict(zip(parts("texts"), parts("answers"), strict=True))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_batch_is_the_first_tokens_of_neighbours_in_length_and_their_label_is_asked(task, split):
    there = held(task, split)
    for index in range(task.rows(split) // WINDOW):
        batch = task.batch(split, 0, index, WINDOW)
        end, prompt = batch.end, batch.input_ids.shape[1] - batch.end - 1
        assert batch.attention_mask is None and batch.needed is None and batch.difficulty is None
        assert end % STEP == 0 and end >= SHORTEST and prompt == len(texts._about(task.folder)["prompt"])
        lengths = []
        for row, said in zip(batch.input_ids.tolist(), batch.answers.tolist(), strict=True):
            (whole,) = {text for text in there if text[:end] == tuple(row[:end])}
            lengths.append(len(whole))
            assert (row[-1],) == (said[-2],) == there[whole]
            assert said[:-2] + said[-1:] == [IGNORED] * (len(row) - 1)
        assert min(lengths) // STEP * STEP == end
        # Of 60 lengths in 8 steps a window of 64 spans few: of all training texts 2, where there are fewest 6.
        assert max(lengths) < end + (2 if split == "train" else 6) * STEP
        assert (batch.questions[:, -2] == 0).all() and (batch.questions >= 0).sum() == WINDOW


@pytest.fixture(scope="module")
def translated(tmp_path_factory, root) -> Texts:
    """Texts of numbers, and the same numbers in words of their own, one for each."""
    folder, draw = tmp_path_factory.mktemp("translated"), random.Random(2)
    rows = [[draw.randrange(30) for _ in range(draw.randint(8, 40))] for _ in range(1600)]
    train = write(folder / "train.en", [" ".join(f"one{number}" for number in row) for row in rows])
    write(folder / "train.de", [" ".join(f"ein{number}" for number in row) for row in rows])
    return Texts(str(root / texts.kept(root, "multi30k", train, None, rows=64)))


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_token_of_a_translation_is_a_question_and_those_of_a_batch_end_together(translated, split):
    there = held(translated, split)
    for index in range(min(4, translated.rows(split) // WINDOW)):
        batch, lengths = translated.batch(split, 0, index, WINDOW), []
        said = int(batch.questions.max()) + 1
        assert batch.questions[:, -said - 1 : -1].tolist() == [list(range(said))] * WINDOW
        for row, answers in zip(batch.input_ids.tolist(), batch.answers.tolist(), strict=True):
            whole = {text for text in there if text[: batch.end] == tuple(row[: batch.end])}
            assert tuple(row[-said:]) in {there[text][:said] for text in whole}
            lengths += [len(there[text]) for text in whole]
            assert answers[-said - 1 : -1] == row[-said:]
            assert answers[: -said - 1] == [IGNORED] * (len(row) - said - 1) and answers[-1] == IGNORED
        assert said == min(lengths) and 1 < said <= texts.ANSWER


def test_a_translation_depends_on_both_files(tmp_path):
    source, target = tmp_path / "a.en", tmp_path / "a.de"
    write(source, ["one two"])
    write(target, ["eins zwei"])
    before = texts.inputs_of("multi30k", str(source), None)
    write(target, ["drei vier"])
    assert texts.inputs_of("multi30k", str(source), None) != before


def test_each_label_has_its_own_answer(task):
    """The first word of the fixture's texts tells."""
    batch = task.batch("test", 0, 0, WINDOW)
    told = {(word, said) for word, said in zip(batch.input_ids[:, 1].tolist(), batch.answers[:, -2].tolist())}  # noqa: B905
    assert len(told) == len({word for word, _ in told}) == len({said for _, said in told}) == 2


def test_no_two_batches_of_an_epoch_share_a_row_and_epochs_differ(task):
    def read(index: int, size: int = WINDOW, seed: int = 0) -> list[tuple[int, ...]]:
        return [tuple(row[:SHORTEST]) for row in task.batch("test", seed, index, size).input_ids.tolist()]

    count = task.rows("test") // WINDOW
    epoch = [row for index in range(count) for row in read(index)]
    assert len(epoch) == len(set(epoch)) == task.rows("test") >= 128
    assert read(0) == read(0) and read(0) != read(0, seed=1) and read(0) != read(count)
    assert set(read(1, size=16)) < set(read(1))


def test_a_batch_larger_than_a_window_is_one_too_and_one_larger_than_the_split_is_refused(task):
    assert task.batch("train", 0, 0, 3 * WINDOW).input_ids.shape[0] == 3 * WINDOW
    with pytest.raises(UserError, match="a batch of 6400 rows was asked for"):
        task.batch("test", 0, 0, 6400)


def test_rows_are_known_by_what_the_files_hold(tmp_path, root, files, monkeypatch):
    train, test = files
    copy = write(tmp_path / "copy.tsv", lines(2600, 0))
    assert texts.inputs_of("sst2", copy, test) == texts.inputs_of("sst2", train, test)
    others = [("sst2", train, None), ("sst2", test, test), ("agnews", train, test)]
    assert len({json.dumps(texts.inputs_of(*one)) for one in [("sst2", train, test), *others]}) == 4
    first = texts.kept(root, "sst2", train, test, 128)
    monkeypatch.setattr(texts, "encoded", lambda *_: pytest.fail("these rows are there already"))
    assert texts.kept(root, "sst2", copy, test, 64) == first
    assert jobs.model_inputs("sst2", 20, 0, first)["task"] == {"task": "sst2", "rows": first}


@pytest.mark.parametrize("name", [one.name for one in SYNTHETIC])
def test_what_a_synthetic_task_depends_on_has_not_changed(name):
    """What is in stores stays there to be found."""
    shape = asdict(jobs.SHAPE)
    assert jobs.model_inputs(name, 700, 1) == {
        "format": jobs.FORMAT, "task": {"task": name}, "shape": shape, "steps": 700, "seed": 1,
    }  # fmt: skip


def test_where_there_is_no_test_file_a_part_is_held_out(tmp_path, root, files):
    rows = texts.kept(root, "sst2", files[0], None, 64)
    found = Texts(str(root / rows))
    parts = [set(held(found, split)) for split in ("train", "validation", "test")]
    assert all(parts) and not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def config_of(tmp_path, *words: str):
    overrides = ["experiment=policies", "study.tasks=[sst2]", "study.seeds=[0]", "study.shares=[0.25]"]
    overrides += ["study.rows=128", "study.steps=4", "study.repeats=1", f"runs={tmp_path}", "format=json", *words]
    return compose.compose("sweep", overrides), overrides


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study.train_file="], "give study.train_file=FILE"),
        (["study.train_file=nowhere.tsv"], "no such file"),
        (["study.test_file=nowhere.tsv"], "no such file"),
        (["study.train_file=again.tsv", "study.test_file=again.tsv"], "every text to learn from is a test as well"),
        (["study.tasks=[sst3]"], "did you mean 'sst2'"),
        (["study.tasks=[wnut17]"], "whose texts have no answer each: choose from recall, .*agnews"),
        (["study.tasks=[multi30k]", "study.train_file=alone.en"], "alone.de is missing; give sentences, a line each"),
        (["study.tasks=[sst2,agnews]"], "study them in turn"),
        (["study.tasks=[recall]"], "study.train_file is for"),
        (["study.methods=[oracle]"], "nothing that is possible for sst2"),
        (["study.rows=100000"], "study.rows=100000 is above the 128 test texts"),
        (["study.tasks=[agnews]"], "line 1 has the label '0', which is none of World, "),
        (["study.train_file=unlabelled.tsv"], "line 2 is not a text, a tab and a label"),
        (["study.train_file=one_label.tsv"], "every text to train on has one label"),
        (["study.train_file=few.tsv"], "fewer than 64: give more or longer texts"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_any_work(tmp_path, files, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "unlabelled.tsv", ["a film\t1", "another film"])
    write(tmp_path / "one_label.tsv", [line for line in lines(2600, 0) if line.endswith("1")])
    write(tmp_path / "few.tsv", lines(100, 0))
    write(tmp_path / "alone.en", ["a dog runs"])
    write(tmp_path / "again.tsv", lines(100, 0))
    given = [f"study.train_file={files[0]}", f"study.test_file={files[1]}", *words]
    config, overrides = config_of(tmp_path / "runs", *given)
    with pytest.raises(UserError, match=said) as caught:
        run.main(config, overrides)
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_files_are_seen_from_the_persons_folder_and_their_names_are_taken_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = config_of(tmp_path, "study.train_file=a,b[1].tsv")[0].study
    assert study.train_file == str(tmp_path / "a,b[1].tsv") and study.test_file is None


@pytest.mark.parametrize("name", ["random", "gradients", "gradients, question known", "Ada-KV"])
def test_a_method_keeps_exactly_an_eighth_of_contexts_of_several_lengths(task, name):
    (method,) = named([name])
    model = small_model.build(task.vocab_size, small_model.Shape(), 0).eval()
    shares = measure(retrofitted(method, model, task, 0.125, 0), task, 128, prepared=method.around)
    assert torch.allclose(shares.kept, torch.full_like(shares.kept, 0.125))
    assert not len(shares.precision) and not len(shares.difficulty)


def test_gradients_of_a_short_context_are_those_of_its_second_half():
    short, (method,) = RecallConfig(length=14, fewest=2, facts=4, decoys=0), named(["gradients"])
    model = small_model.build(short.vocab_size, small_model.Shape(), 0).eval()
    shares = measure(retrofitted(method, model, short, 0.5, 0), short, 64, prepared=method.around)
    assert torch.allclose(shares.kept, torch.full_like(shares.kept, 0.5))


def test_a_small_model_learns_what_its_texts_are(task):
    model = small_model.train(task, steps=60, seed=0)
    assert measure(retrofit(model, DenseConfig()), task, 128).right.mean() > 0.9


@pytest.mark.slow
def test_a_study_of_texts_runs_without_its_files_and_leaves_out_who_needs_the_truth(
    tmp_path, files, capsys, caplog, monkeypatch
):
    mine = [write(tmp_path / Path(file).name, Path(file).read_text().splitlines()) for file in files]
    words = [f"study.train_file={mine[0]}", f"study.test_file={mine[1]}", "study.methods=[random,gradients,oracle]"]
    config, overrides = config_of(tmp_path / "runs", *words)
    was = run._made

    def made(*given):
        for file in mine:
            Path(file).unlink()
        return was(*given)

    monkeypatch.setattr(run, "_made", made)
    with caplog.at_level("INFO", logger="pipelines.progress"):
        assert run.main(config, overrides) == 0
    assert "left out: oracle on sst2" in caplog.text
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["task"], row["method"]) for row in records] == [("sst2", "random"), ("sst2", "gradients")]
    for row in records:
        assert row["kept"] == pytest.approx(0.25) and row["token_of_dense"] > 0
        assert row["precision"] is row["recall"] is row["kept_and_difficulty"] is None
        assert "even_from" not in row
    assert "| 0.250 |" in table.markdown(records)
